"""The loss of embedding distillation: how far the student's vectors are from a teacher's."""

from __future__ import annotations

import torch


def embedding_loss(vectors: torch.Tensor, targets: torch.Tensor, *, num_texts: int) -> torch.Tensor:
    """Returns this worker's share of a batch's mean loss: the shares add up to the mean.

    For text i of a batch of B, with the student's vector v_i and the teacher's t_i:

        1/B sum_i [ 1 - cos(v_i, t_i) ]

    EmbedDistill (arXiv 2301.12005, equations 7 and 8) takes the distance between the two,
    sentence-transformers' EmbedDistillLoss this by default. As both are of unit length it is half
    of the squared distance, so that a choice of mean squared error would be one of learning rate.

    Args:
        vectors: The student's, ``[texts, dimensions]``, unit length; of this worker's texts.
        targets: The teacher's of the same texts, as `vectors`.
        num_texts: Of the batch, over all workers.

    Returns:
        A scalar with a gradient.
    """
    return (1 - (vectors * targets).sum(dim=1)).sum() / num_texts
