"""Wikipedia with up to six modalities: the pairs of `wikipedia`, with two image features and four text features.

Images as CNN features after PCA and as SIFT bags of words; texts as TF-IDF and as 100 LDA topics of the articles in
English, German and Spanish (Mogadala and Rettinger, "Multi-modal correlated centroid space for multi-lingual
cross-modal retrieval", ECIR 2015). Split, labels and division of the test pairs are those of `wikipedia`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fedxmr.data import wikipedia
from fedxmr.data.dataset import Dataset, Scaling
from fedxmr.data.files import RemoteFile, github
from fedxmr.data.wikipedia import Labels, Show, show_image, show_text

TOPICS = 100


def _topics(language: str, sha256: str) -> RemoteFile:
    commit = "8724bb8c4e7c98a47240566cdfe3b8a3ceb24adc"
    url = github("adityamogadala/CSquareSUR", commit, f"Matlab/Topics100/{language}-100.mat")
    return RemoteFile(f"wikipedia_multilingual/{language}-100.mat", url, sha256)


ENGLISH = _topics("English", "d6c47057e31f981338c49a988cd50a9761b058321085d377285b63c885c7f2ba")
GERMAN = _topics("German", "43a470cef995019bffb43b0412cdfbc1e51b272bae47c40f455f9f780a2ca456")
SPANISH = _topics("Spanish", "a2e8092afbd68c74ba9ddaaaf031e09f3a100ddee75bba03099088ce38120a2b")


class _Modality(NamedTuple):
    read: Callable[[Labels, Path | None], Tensor]  # [2866, d]
    scaling: Scaling
    look: Show
    notes: tuple[str, ...] = ()


def _topics_of(file: RemoteFile, prefix: str) -> _Modality:
    def read(_: Labels, data_dir: Path | None) -> Tensor:
        return wikipedia.both_parts(file, f"{prefix}_arr_tr", f"{prefix}_arr_te", TOPICS, data_dir)

    return _Modality(read, "standardise", show_text)


MODALITIES: Mapping[str, _Modality] = {
    "cnn": _Modality(wikipedia.read_cnn, "standardise", show_image, (wikipedia.CNN_NOTE,)),
    "sift": _Modality(lambda _, data_dir: wikipedia.read_sift_lda(data_dir)[0], "standardise", show_image),
    "tfidf": _Modality(lambda _, data_dir: wikipedia.read_tfidf(data_dir), "norm", show_text),
    "english": _topics_of(ENGLISH, "en"),
    "german": _topics_of(GERMAN, "de"),
    "spanish": _topics_of(SPANISH, "es"),
}

Name = Literal["cnn", "sift", "tfidf", "english", "german", "spanish"]


class Options(BaseModel):
    """Which modalities, and the seed of the 231/462 division."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modalities: tuple[Name, ...] = Field(
        ("cnn", "sift", "tfidf", "english", "german", "spanish"),
        min_length=2,
        description="cnn, sift: images (128-d); tfidf: texts (1000-d); english, german, spanish: topics (100-d)",
    )
    split_seed: int = Field(0, description="seed of the division of the 693 test pairs into validation and test")

    @field_validator("modalities")
    @classmethod
    def _different(cls, names: tuple[Name, ...]) -> tuple[Name, ...]:
        if len(set(names)) < len(names):
            raise ValueError("expected different modalities")
        return names


def load(options: Options, data_dir: Path | None = None) -> Dataset:
    """Wikipedia in the chosen modalities. Raises InputError for files that are missing, altered or damaged."""
    labels = wikipedia.read_labels(data_dir)
    chosen: dict[str, _Modality] = {name: MODALITIES[name] for name in options.modalities}
    features = {name: modality.read(labels, data_dir) for name, modality in chosen.items()}
    scaling = {name: modality.scaling for name, modality in chosen.items()}
    notes = tuple(note for modality in chosen.values() for note in modality.notes)
    views = "wikipedia-multi: several modalities are features of one image, and several of one article"
    looks = {name: modality.look for name, modality in chosen.items()}
    notes = (views, *notes)
    return wikipedia.divide(labels, features, scaling, looks, options.split_seed, data_dir, notes, "wikipedia-multi")
