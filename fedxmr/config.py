"""The configuration: frozen and validated, YAML in, resolved YAML out.

Every option lives beside the code it steers (StrategyConfig, PartitionConfig, a learner's or a data set's options);
here they become one tree. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fedxmr.data import FOLDER, Scaling, own_folder, source
from fedxmr.errors import InputError
from fedxmr.learners import learner_class
from fedxmr.partition import PartitionConfig
from fedxmr.strategies import StrategyConfig, preset


class _Loader(yaml.SafeLoader):
    """The booleans of YAML 1.2, true and false alone: under 1.1 the key of `evaluation: {on: all-test}` is True.

    A key that a mapping has twice is an error, of which YAML's own loader takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class _Named(_Section):
    """A part chosen by name with options of its own; in YAML the options stand beside the name."""

    section: ClassVar[str]
    name: str
    options: BaseModel

    @classmethod
    def _options(cls, name: str) -> type[BaseModel]:
        """The model of the named part's options. Raises InputError for an unknown name."""
        raise NotImplementedError

    @classmethod
    def _given(cls, name: str) -> dict[str, Any]:  # noqa: ARG003
        """Options that the name itself says."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or isinstance(value.get("options"), BaseModel):
            return value
        own = {key: value[key] for key in cls.model_fields if key in value and key != "options"}
        name = own.setdefault("name", cls.model_fields["name"].default)
        rest = {key: option for key, option in value.items() if key not in own}
        model = cls._options(str(name))
        try:
            return {**own, "options": model.model_validate({**rest, **cls._given(str(name))})}
        except ValidationError as error:
            beside = set(cls.model_fields) - {"options"}
            raise InputError(one_line(error, model, section=[cls.section], beside=beside)) from error

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = handler(self)
        own.pop("options")
        return {**own, **self.options.model_dump(mode="json", by_alias=True)}


class DatasetConfig(_Named):
    """Which data. Further keys are the data set's own options."""

    section: ClassVar[str] = "dataset"
    name: str = Field("digits", description="a registered data set, or the path of a folder in the documented format")
    data_dir: Path | None = Field(
        None, description="where to look for files first; then FEDXMR_DATA and the user cache"
    )
    scaling: dict[str, Scaling] = Field(
        default_factory=dict,
        description="modality -> standardise, isotropic, norm or none, in place of what data set and learner recommend",
    )
    task: Literal["standard", "zero-shot", "generalised-zero-shot"] = Field(
        "standard", description="zero-shot: some classes are unseen in training; generalised adds its own scores"
    )
    seen_share: float | None = Field(
        None, gt=0, lt=1, description="zero-shot tasks: the share of the classes that are seen; null: half"
    )
    class_seed: int | None = Field(
        None, description="zero-shot tasks: which classes are unseen is drawn from it; null: from the run's seed"
    )
    class_vector_width: int | None = Field(
        None, ge=2, description="class vectors reduced to so many dimensions by PCA; null: as they are"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seen_share is not None and self.task == "standard":
            raise ValueError("seen_share: expected a zero-shot task, got task standard")
        if self.name == own_folder.NAME and self.task != "standard":
            raise ValueError(f"task: expected standard where every client has its own folder, got {self.task}")
        return self

    @classmethod
    def _options(cls, name: str) -> type[BaseModel]:
        return source(name).options

    @classmethod
    def _given(cls, name: str) -> dict[str, Any]:
        return {"path": name} if source(name) is FOLDER else {}


class LearnerConfig(_Named):
    """Which learner. Further keys are the learner's own options."""

    section: ClassVar[str] = "learner"
    name: str = Field("dscmr", description="a registered learner")

    @classmethod
    def _options(cls, name: str) -> type[BaseModel]:
        return learner_class(name).Config


class FederationConfig(_Section):
    """Who takes part, and how long."""

    clients: PositiveInt = Field(3, description="N")
    rounds: PositiveInt = Field(40, description="T; of a learner that needs but one, such as cca, 1")
    epochs: PositiveInt = Field(2, description="E, local epochs of each stage")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="what layers multiply in as they train; weights, moments, losses and scores are float32"
    )
    sample: PositiveInt | None = Field(None, description="K clients per round, drawn from (seed, round); null: all")
    standardise: Literal["federated", "client", "none"] = Field(
        "federated", description="whose means and deviations scale the features; none: nobody's, norm alone is applied"
    )
    min_clients: PositiveInt | None = Field(
        None, description="good updates a round needs to stand; null: 2, or 1 where only one takes part"
    )
    tolerate_failures: bool = Field(False, description="go on without a client that fails or is rejected")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a client of a round is out of reach in it")
    deadline: PositiveFloat = Field(
        600.0, description="seconds a client has to answer a message; local: looked at when it has answered"
    )
    checkpoint_every: int = Field(5, ge=0, description="rounds between checkpoints of a simulation; 0: none")
    start_deadline: PositiveFloat = Field(60.0, description="seconds the clients have to answer the start query")

    @model_validator(mode="after")
    def _check(self) -> Self:
        taking_part = self.sample or self.clients
        if taking_part > self.clients:
            raise ValueError(f"sample: expected at most the {self.clients} clients, got {self.sample}")
        if self.min_clients is not None and self.min_clients > taking_part:
            raise ValueError(f"min_clients: expected at most the {taking_part} taking part, got {self.min_clients}")
        return self

    @property
    def quorum(self) -> int:
        """Good updates a round needs to stand."""
        return self.min_clients or min(2, self.sample or self.clients)


class EvaluationConfig(_Section):
    """What is measured, when and on what."""

    every: int = Field(1, ge=0, description="rounds between evaluations; the last round always is one; 0: never")
    clients: PositiveInt = Field(20, description="at most so many clients are evaluated, a seeded panel")
    protocol: Literal["honest", "paper"] = Field(
        "honest", description="honest: choose on validation, then report test; paper adds best_on_test, a leak"
    )
    on: Literal["test", "all-test"] = Field(
        "test", description="all-test: the published test part, validation included"
    )


class RuntimeConfig(_Section):
    """Where it runs. No number depends on this but by rounding."""

    engine: Literal["auto", "local", "ray"] = Field(
        "auto", description="what carries messages; auto: ray where there is a GPU or an option that only ray has"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="torch threads of a process; null: the cores it has. 1 for bit-equal runs"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    memory_budget: ByteSize | None = Field(
        None, gt=0, description="memory for living clients, such as 8GB, of each machine; null: half; the rest in files"
    )
    workers: int | None = Field(
        None, ge=1, le=4096, description="ray: worker processes; null: what divides cores and clients per round"
    )
    cpus_per_client: int | None = Field(None, ge=1, le=1024, description="ray: cores of a worker; null: its share")
    gpus_per_client: float | None = Field(
        None, gt=0, le=64, description="ray: GPUs of a worker, such as 0.25; null: 1 where there is one"
    )
    ray_address: str | None = Field(
        None, description="ray: host:port of a running cluster; null: a private one on this machine"
    )

    @field_validator("gpus_per_client")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("above 1, expected a whole number of GPUs")
        return gpus

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "local" and (only := self.only_ray):
            raise ValueError(f"{only[0]}: only the engine ray has it, got engine local")
        if self.engine == "ray" and ":" in self.device:
            raise ValueError(f"device: a worker sees its own GPU alone, expected cuda, cpu or auto, got {self.device}")
        return self

    @property
    def only_ray(self) -> list[str]:
        """The keys that are set and that only the engine `ray` has."""
        keys = ("ray_address", "workers", "cpus_per_client", "gpus_per_client")
        return [key for key in keys if getattr(self, key) is not None]


_NAMED = {
    section: str(model.model_fields["name"].default)
    for section, model in (("dataset", DatasetConfig), ("learner", LearnerConfig), ("strategy", StrategyConfig))
}
"""The sections that choose something by name, and what they choose by default."""


class Config(_Section):
    """One run."""

    seed: int = Field(0, ge=0)
    dataset: DatasetConfig = Field(default_factory=lambda: DatasetConfig.model_validate({}))
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    learner: LearnerConfig = Field(default_factory=lambda: LearnerConfig.model_validate({}))
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        """A strategy's name brings its choices, a learner's its rounds; a bare name stands for a section with it."""
        if not isinstance(value, Mapping):
            return value
        value = _spelt_out(value)
        if isinstance(chosen := value.get("strategy"), Mapping):
            value["strategy"] = {**preset(str(chosen.get("name", _NAMED["strategy"]))), **chosen}
        learner, federation = value.get("learner"), value.get("federation", {})
        if isinstance(learner, Mapping) and isinstance(federation, Mapping):
            rounds = getattr(learner_class(str(learner.get("name", _NAMED["learner"]))), "rounds", None)
            value["federation"] = {"rounds": rounds, **federation} if rounds else federation
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.deployed and self.partition != PartitionConfig():
            raise ValueError("partition: there is nothing to divide where every client has its own folder")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration; `from_yaml` of it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)

    @property
    def deployed(self) -> bool:
        """Whether the clients are on machines of their own, each with its own data."""
        return self.dataset.name == own_folder.NAME

    @property
    def tolerant(self) -> bool:
        """Whether a run goes on without a client that fails or is rejected, as long as enough others are good."""
        return self.federation.tolerate_failures or self.deployed

    @property
    def centralized(self) -> bool:
        """Whether one client has all the data and shares nothing."""
        return self.federation.clients == 1 and self.strategy.share == "nothing"

    @property
    def method(self) -> str:
        """What a run is called after: its strategy, but for one client alone."""
        return "centralized" if self.centralized else self.strategy.name

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change while a run goes on, as JSON.

        It leaves out `runtime`, where the data lie, and how many rounds there are, which may grow.
        """
        return self.model_dump(
            mode="json",
            by_alias=True,
            exclude={"runtime": True, "federation": {"rounds"}, "dataset": {"data_dir"}},
        )

    @property
    def experiment(self) -> str:
        """The name of the simulation that states belong to: a digest of its identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_yaml(cls, text: str) -> Config:
        """Parse and check. Raises InputError with one line."""
        return resolve(parse_yaml(text, "the configuration"))


def resolve(tree: Mapping[str, Any]) -> Config:
    """A checked configuration from a nested mapping. Raises InputError naming the key, what it takes and what came."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(one_line(error, Config)) from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """A YAML mapping; the empty text is the empty one. Raises InputError naming `source`."""
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected keys and values, got {type(tree).__name__}")
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def override(tree: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`tree` with `section.key=value` assignments applied; values are YAML. Raises InputError."""
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise InputError(f"{assignment!r}: expected key=value, such as strategy.gamma=1.0")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as error:
            raise InputError(f"{dotted}: expected a YAML value, got {text!r}") from error
        tree = merged(tree, nested(dotted, value))
    return dict(tree)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """{'a': {'b': value}} for 'a.b'."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return dict(value)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, key by key. Another data set, learner or strategy starts its section anew."""
    base, over = _spelt_out(base), _spelt_out(over)
    result = _laid_over(base, over)
    for section in _NAMED.keys() & over.keys() & base.keys():
        chosen = isinstance(over[section], Mapping) and isinstance(base[section], Mapping)
        if chosen and "name" in over[section] and over[section]["name"] != base[section].get("name", _NAMED[section]):
            result[section] = over[section]
    return result


def _spelt_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A bare name stands for a section with that name."""
    return {k: {"name": v} if k in _NAMED and isinstance(v, str) else v for k, v in tree.items()}


def _laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            result[key] = _laid_over(old, value)
        else:
            result[key] = value
    return result


def one_line(
    error: ValidationError, model: type[BaseModel], section: Sequence[str] = (), beside: Iterable[str] = ()
) -> str:
    """The first of pydantic's complaints in one line. `beside`: further keys known next to the model's own."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    dotted = ".".join([*section, *where])
    if first["type"] == "extra_forbidden":
        known = _keys(_model_at(model, where[:-1])) | set(beside)
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        meant = ".".join([*section, *where[:-1], *near])
        hint = f"did you mean {meant!r}?" if near else f"known: {', '.join(sorted(known))}"
        return f"unknown configuration key {dotted!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first.get("ctx", {}).get("error"), InputError):
        return message
    if first["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {message[:1].lower()}{message[1:]}, got {first['input']!r}"


def _model_at(model: type[BaseModel], where: Sequence[str]) -> type[BaseModel]:
    """The model of a section, found by its keys."""
    for key in where:
        annotation = next(f.annotation for name, f in model.model_fields.items() if key in (name, f.alias))
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model


def _keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}
