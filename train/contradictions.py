"""Fields of a recipe that contradict each other: ValueError naming them, and the remedy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config import Recipe


def check_loss(recipe: Recipe) -> None:
    """Of the loss, sparsity and queries as bags."""
    bag = recipe.query_encoder == "bag"
    if recipe.query_idf and (not bag or recipe.streaming):
        other = "streaming=true, whose passages are not at hand" if bag else "query_encoder=model"
        raise ValueError(f"query_idf=true contradicts {other}")
    if bag and (recipe.query_sparsity > 0 or recipe.query_top_k is not None):
        raise ValueError("query_sparsity and query_top_k contradict query_encoder=bag: nothing of queries is learnt")
    if recipe.contrastive_weight == 0 and recipe.kd_weight == 0:
        raise ValueError("contrastive_weight=0 contradicts kd_weight=0: nothing is learnt")
    weights = recipe.query_sparsity + recipe.passage_sparsity
    if recipe.sparsity == "none" and weights > 0:
        raise ValueError("query_sparsity and passage_sparsity need a regulariser: set sparsity to flops or l1")
    if recipe.sparsity != "none" and weights == 0:
        raise ValueError(f"sparsity={recipe.sparsity} has no weight: set query_sparsity and passage_sparsity above 0")
    if recipe.sparsity_warmup_steps and recipe.sparsity == "none":
        raise ValueError("sparsity_warmup_steps needs a regulariser: set sparsity to flops or l1")
    if recipe.distillation != "kl" and recipe.kd_weight == 0:
        raise ValueError(f"distillation={recipe.distillation} contradicts kd_weight=0, which switches it off")
    if recipe.contrastive_weight == 0 and recipe.teacher_embeddings is None and recipe.group_size == 1:
        raise ValueError("contrastive_weight=0 contradicts group_size=1: there is no other passage to distil from")
    if bag and recipe.head == "dense":
        raise ValueError("query_encoder=bag contradicts head=dense, whose dimensions are no tokens")
    if recipe.head == "dense":
        for name, unset in {"sparsity": "none", "query_top_k": None, "passage_top_k": None}.items():
            if getattr(recipe, name) != unset:
                raise ValueError(f"{name}={getattr(recipe, name)} contradicts head=dense, which is not sparse")


def check_refresh(recipe: Recipe) -> None:
    """Of mining while training."""
    if recipe.refresh_steps is None:
        for field in dataclasses.fields(recipe):
            if field.name.startswith("refresh_") and getattr(recipe, field.name) != field.default:
                raise ValueError(f"{field.name} needs refresh_steps")
        return
    if recipe.refresh_skip >= recipe.refresh_depth:
        raise ValueError(
            f"refresh_skip must be below refresh_depth={recipe.refresh_depth}, found {recipe.refresh_skip}"
        )
    if recipe.refresh_max_share is not None and not 0 < recipe.refresh_max_share <= 1:
        raise ValueError(f"refresh_max_share must be above 0 and at most 1, found {recipe.refresh_max_share}")
    stored = recipe.backbone in ("frozen", "top") and recipe.cache_hidden
    others = {
        "streaming=true, whose queries cannot be asked for": recipe.streaming,
        "contrastive_weight=0 without teacher_embeddings: mined negatives have no teacher scores": (
            recipe.contrastive_weight == 0 and recipe.teacher_embeddings is None
        ),
        "teacher_embeddings with refresh_corpus, whose passages have none": bool(
            recipe.teacher_embeddings and recipe.refresh_corpus
        ),
        "cache_hidden=true with refresh_corpus, whose passages are not stored": bool(stored and recipe.refresh_corpus),
    }
    for other in (other for other, holds in others.items() if holds):
        raise ValueError(f"refresh_steps contradicts {other}")
