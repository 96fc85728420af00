"""Class vectors in fewer dimensions, by principal component analysis (JFSE, section 4.6 and figure 9a).

The paper does not say what its PCA is fitted on. It reduces the vectors of Wikipedia's ten classes to as many as 200
dimensions, and ten vectors span nine around their mean, so it is of more vectors than these. Here it is of all that the
data set's file has (Pascal's: 80 names), and of the classes' own where that is all there is; of unseen classes too, for
everybody knows their vectors. They are centred, as PCA does, so cosines between classes change at any width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedxmr.data.dataset import Dataset
from fedxmr.errors import InputError


def with_narrow_class_vectors(data: Dataset, width: int) -> Dataset:
    """The data set with class vectors [C, width], float32.

    Raises InputError for a data set without class vectors, for more dimensions than the vectors span around their mean,
    and for so few that classes would coincide.
    """
    vectors = data.spec.class_vectors
    if vectors is None:
        raise InputError(
            f"dataset.class_vector_width: expected class vectors to reduce, got {data.name}, which has none"
        )
    fitted = (vectors if data.named_vectors is None else data.named_vectors).double()
    most = int(torch.linalg.matrix_rank(fitted - fitted.mean(0)))
    if width > most:
        raise InputError(
            f"dataset.class_vector_width: expected at most {most}, the dimensions that the {len(fitted)} vectors of "
            f"{data.name} span around their mean, got {width}"
        )
    from sklearn.decomposition import PCA

    # float64: server and clients compare the result by its hash, in float32
    pca = PCA(width, svd_solver="full").fit(fitted.numpy())
    narrow = torch.from_numpy(pca.transform(vectors.double().numpy()))
    apart = torch.pdist(torch.cat([narrow, narrow.new_zeros(1, width)]))  # from one another, and from nothing
    if float(apart.min()) < 1e-6 * float(apart.max()):
        raise InputError(
            f"dataset.class_vector_width: expected vectors that tell the classes of {data.name} apart, got zeros, or "
            f"the same vector twice, at {width}"
        )
    note = f"{data.name}: class vectors of {width} dimensions, not {vectors.shape[1]}, by PCA of {len(fitted)} vectors"
    return replace(data, spec=replace(data.spec, class_vectors=narrow.float()), notes=(*data.notes, note))
