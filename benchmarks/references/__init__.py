"""Programs that fedxmr is compared with. They know nothing of it: `python -m benchmarks.references.NAME JOB.json`."""
