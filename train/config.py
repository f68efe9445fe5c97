"""Recipe: everything that decides a training run, from YAML and command-line overrides, checked before work starts."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lens.config import Pooling, Positions, Prompt, QueryEncoder, Transform
from train import contradictions
from train.fields import typed

OWN_NEGATIVES_TYPES = ("symmetric_class", "symmetric_clustering")
"""Another query's passage may share this query's label, so only a query's own negatives count."""
TYPES = ("retrieval", "only_1neg", "symmetric_sts", *OWN_NEGATIVES_TYPES)
"""Values of a training example's `type`."""
ALIASES = {"normal": "retrieval"}
"""Other names of types, which the published data uses."""
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens, sizes in texts unless a field says otherwise."""

    base: str
    """Backbone: a folder or a hub id."""
    data: tuple[str, ...]
    """Training data in the bge format (query, pos, neg, ...): .jsonl, .jsonl.gz, .json or .parquet files, folders of
    them (each file or sub-folder is one data set), or data sets of the hub as org/name, org/name:subset,
    org/name@revision:subset. Every batch comes from one data set."""
    output: str
    """Folder of the run: the finished model's artifact, checkpoints, log and resolved recipe."""
    clusters: str | None = None
    """Clusters folder of clustering/run.py; None trains the full vocabulary head."""
    revision: str | None = None
    """Commit of the backbone on the hub."""

    data_weights: tuple[float, ...] | None = None
    """How many times each entry of `data` is seen in an epoch; a fraction takes a sample, drawn anew in every epoch.
    None: once each."""
    streaming: bool = False
    """Whether rows are read as they come, for data larger than the disk; they are then shuffled by file and within
    `shuffle_buffer`, and checked when they are read."""
    shuffle_buffer: int = 4096
    """Rows that are shuffled together and held in memory, of every data set, when streaming."""

    head: Literal["lexical", "dense"] = "lexical"
    """`dense` is the paper's ablation: no head, the embedding is the state at the last pooled position; goes with
    clusters=null and pooling=last, and with positions=all that position is EOS."""
    whiten: bool = False
    """Whether the centroids are whitened before training: for sentence encoders, which have no LM head."""
    transform: Transform | None = None
    """Layer between hidden states and head, see LensConfig; None: the MLM head's own where it has one, else none."""
    pooling: Pooling = "max"
    """How positions become one vector, see LensConfig."""
    positions: Positions | None = None
    """Pooled positions, see LensConfig; None: shifted for decoders, content for encoders."""
    prompt: Prompt | None = None
    """Prompt form, see LensConfig; None: lens for decoders, plain for encoders."""
    query_encoder: QueryEncoder = "model"
    """bag: a query is the bag of its tokens, for which no model is run (splade-doc)."""
    query_idf: bool = False
    """Whether the tokens of bags are weighted by their inverse document frequency in the training passages."""
    bidirectional: bool = True
    """Whether a decoder's causal mask is lifted."""
    normalize: bool = True
    """Whether embeddings are L2-normalised."""
    query_max_length: int | None = None
    """Longest query in tokens, instruction included; None: 512, or what the backbone allows."""
    document_max_length: int | None = None
    """Longest passage in tokens; None: 512, or what the backbone allows."""
    attn_implementation: str | None = None
    """sdpa, eager, flex_attention, flash_attention_2, flash_attention_3, or a kernel of the hub (org/name); None leaves
    the choice to transformers."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Loads the backbone in 4 bits (NF4, doubly quantised scales, computing in `precision`) or 8 bits (LLM.int8()) with
    bitsandbytes; only backbone=lora and frozen."""
    compile: bool = False
    """Whether torch.compile compiles the backbone's layers: pays on GPUs in runs of more than some hundred steps,
    needs a C++ compiler."""

    backbone: Literal["frozen", "top", "lora", "full"] = "lora"
    """What is trained of the backbone; `top`: its last layers."""
    top_layers: int = 1
    """Layers that backbone=top trains."""
    train_head: bool = False
    """Whether centroids (and bias) are trained; a transform always is."""
    lora_r: int = 32
    """Rank of the LoRA matrices."""
    lora_alpha: int = 64
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.1
    """Dropout before the LoRA matrices, as a share."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get LoRA matrices; `all-linear` alone: every linear layer of the backbone, for
    those with other names."""
    train_special_tokens: bool = True
    """Whether the input rows of <instruct>, <query>, <response> are trained (LoRA with the lens prompt only)."""

    group_size: int = 8
    """Passages per query: one positive and group_size - 1 hard negatives."""
    batch_size: int = 512
    """Queries per contrastive batch over all ranks; must be a multiple of the number of ranks."""
    type_group_size: dict[str, int] | None = None
    """Group sizes of single types of data, as {symmetric_class: 2}, or symmetric_class=2 on the command line; other
    types take group_size, and only_1neg always 2."""
    type_batch_size: dict[str, int] | None = None
    """Batch sizes of single types of data, as {symmetric_sts: 256}, or symmetric_sts=256 on the command line; other
    types take batch_size."""
    in_batch_negatives: bool = True
    """Whether retrieval data also takes the passages of the batch's other queries as negatives, over all ranks.
    Class and clustering data never do."""
    teacher_embeddings: str | None = None
    """File of a bi-encoder's embeddings of all training texts (train/score.py --embeddings). Distillation then covers
    all passages of a batch instead of each query's own; the scores in the data are not used."""
    mask_false_negatives: Literal["none", "duplicates", "teacher"] = "duplicates"
    """Passages left out of the contrastive denominator. duplicates: those with the text of one of the query's
    positives or of the query itself; teacher: also those that the teacher scores above the query's positive by more
    than false_negative_margin. Distillation sees them all."""
    false_negative_margin: float = 0.0
    """In units of the teacher's scores; below 0 it also leaves out passages that score just below the positive."""
    refresh_steps: int | None = None
    """Optimizer steps between minings of hard negatives with the model as it then is (ANCE); None: never. They take the
    place of the data's own, which serve until the first, and have no teacher scores."""
    refresh_corpus: str | None = None
    """What is mined from: .jsonl(.gz), .txt or a BEIR folder; None: the passages of the training data."""
    refresh_negatives: int = 15
    """Negatives mined for each query."""
    refresh_depth: int = 100
    """Ranks that they are drawn from."""
    refresh_skip: int = 0
    """Best ranks left out, where unjudged positives hide."""
    refresh_max_share: float | None = None
    """Their scores must be below the positive's times this, such as 0.95; None: any."""
    temperature: float = 0.02
    """Scores are divided by it before the softmax."""
    kd_weight: float = 1.0
    """Weight of the distillation loss beside the contrastive one; 0 switches it off."""
    kd_temperature: float = 1.0
    """Teacher scores are divided by it: 1 for reranker logits, about 0.05 for cosine similarities."""
    distillation: Literal["kl", "margin_mse"] = "kl"
    """kl: of the softmax over passages, by temperature and kd_temperature; margin_mse: squared difference of the
    margins between the positive's and each other passage's score, student's and teacher's, neither of which is divided
    by its temperature."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss; 0 leaves distillation alone."""
    sparsity: Literal["none", "flops", "l1"] = "none"
    """Regulariser that makes embeddings sparse. flops: the sum over dimensions of the squared mean of the batch's
    values, which also evens out how often dimensions are used; l1: the mean over texts of the sum of the values. The
    batch is that of all ranks."""
    query_sparsity: float = 0.0
    """Weight of the regulariser on queries."""
    passage_sparsity: float = 0.0
    """Weight of the regulariser on passages."""
    sparsity_warmup_steps: int = 0
    """Optimizer steps over which both weights rise with the square of the step."""
    query_top_k: int | None = None
    """Values of a query's embedding that are kept while training, the largest; None: all."""
    passage_top_k: int | None = None
    """Values of a passage's embedding that are kept while training, the largest; None: all."""

    epochs: float = 1.0
    """Passes over all data; ignored when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    gradient_accumulation: int = 1
    """Contrastive batches per optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate (AdamW)."""
    head_learning_rate: float | None = None
    """Peak learning rate of centroids and bias; None: learning_rate."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Schedule after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass."""
    mini_batch_tokens: int | None = None
    """Tokens of one forward pass, padding included: a batch is embedded in mini-batches of that size whose activations
    are computed again in the backward pass (gradient caching), so that batch_size is not bound by memory. None: the
    whole batch in two passes, queries and passages."""
    packed: bool | None = None
    """Texts one after another, without padding. None: where the backbone can and it pays; true: or an error; false:
    never."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Decides batches, negatives, dropout and initial weights."""
    deepspeed: str | None = None
    """DeepSpeed configuration: zero1, zero2, zero3, zero2-offload, zero3-offload (to CPU memory), or a JSON file."""

    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    resume: bool = True
    """Whether to go on from the newest whole checkpoint in `output`."""
    logging_steps: int = 10
    """Optimizer steps between log lines."""
    eval_data: tuple[str, ...] = ()
    """Folders in BEIR layout on which the model is evaluated (nDCG@10) while it trains; the best is kept in
    `output`/best."""
    eval_steps: int = 500
    """Optimizer steps between evaluations; one more follows the last step."""
    eval_instruction: str | None = None
    """Instruction of the evaluation's queries."""
    report_to: tuple[str, ...] = field(default=("tensorboard",))
    """Trackers of transformers' Trainer: tensorboard, wandb, ...; none: []."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    cache_hidden: bool = True
    """With backbone=frozen or top: compute the states of all texts up to the first trained layer once, keep them in a
    file (2 bytes a value) in `output` and train on them."""
    include_backbone: bool = False
    """Whether the finished artifact holds the backbone's weights even when they are the base's or an adapter's."""
    device: str | None = None
    """cpu, cuda or mps; None: the first GPU there is, else the CPU."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, typed(item.name, getattr(self, item.name), hints[item.name]))
            if item.name != "seed" and type(getattr(self, item.name)) is int and getattr(self, item.name) > LARGEST:
                raise ValueError(f"{item.name} must be at most {LARGEST}, found {getattr(self, item.name)}")
        at_least = {
            "group_size": 1, "batch_size": 1, "gradient_accumulation": 1, "top_layers": 1, "lora_r": 1,
            "lora_alpha": 1, "warmup_steps": 0, "save_steps": 1, "save_total_limit": 1, "logging_steps": 1,
            "eval_steps": 1, "workers": 0, "mini_batch_tokens": 1, "query_max_length": 4, "document_max_length": 4,
            "kd_weight": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "shuffle_buffer": 1, "contrastive_weight": 0.0,
            "query_sparsity": 0.0, "passage_sparsity": 0.0, "sparsity_warmup_steps": 0, "query_top_k": 1,
            "passage_top_k": 1, "refresh_steps": 1, "refresh_negatives": 1, "refresh_depth": 1, "refresh_skip": 0,
        }  # fmt: skip
        for name, limit in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= limit:
                raise ValueError(f"{name} must be at least {limit}, found {value}")
        for name in ("temperature", "kd_temperature", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.epochs > 1e6:
            raise ValueError(f"epochs must be at most 1e6, found {self.epochs}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 4294967295, found {self.seed}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, found {self.lora_dropout}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, found {self.max_steps}")
        if self.device is not None and self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device must be cpu, cuda or mps; found {self.device!r}")
        if not self.data:
            raise ValueError("data must name at least one file")
        for source in self.data:
            if self.data.count(source) > 1:
                raise ValueError(f"data names {source} twice: name it once, with data_weights to see it more often")
        self._check_data()
        contradictions.check_loss(self)
        contradictions.check_refresh(self)
        if self.backbone == "frozen":
            if not self.train_head and self.transform in (None, "none"):
                raise ValueError(
                    "nothing is trained: backbone=frozen contradicts train_head=false with transform=none; "
                    "set train_head: true or transform: residual"
                )
            if self.gradient_checkpointing:
                raise ValueError("gradient_checkpointing contradicts backbone=frozen: there is nothing to recompute")
        if self.top_layers != 1 and self.backbone != "top":
            raise ValueError(f"top_layers={self.top_layers} contradicts backbone={self.backbone}: it goes with top")
        if self.head == "dense":
            for name, wanted in {"clusters": None, "pooling": "last", "transform": None, "train_head": False}.items():
                if getattr(self, name) != wanted:
                    raise ValueError(
                        f"{name}={getattr(self, name)} contradicts head=dense: set it to {json.dumps(wanted)}"
                    )
            if self.backbone == "frozen":
                raise ValueError("backbone=frozen contradicts head=dense: nothing is trained")
        if self.whiten and self.clusters is None:
            raise ValueError("whiten=true contradicts the full vocabulary head: give clusters, or whiten: false")
        if self.quantization is not None and self.backbone not in ("lora", "frozen"):
            raise ValueError(
                f"quantization={self.quantization} contradicts backbone={self.backbone}: quantised weights cannot be "
                "trained; use backbone: lora"
            )
        if self.quantization is not None and self.include_backbone:
            raise ValueError(
                f"include_backbone=true contradicts quantization={self.quantization}: merging into quantised weights "
                "would lose what was trained. Merge into the unquantised ones when the run is finished: "
                "lens.load(OUTPUT).save(FOLDER, include_backbone=True)"
            )
        if self.quantization is not None and (self.deepspeed or "").startswith("zero3"):
            raise ValueError(
                f"deepspeed={self.deepspeed} contradicts quantization={self.quantization}: ZeRO-3 cannot share out "
                "quantised weights; use zero1 or zero2"
            )
        if self.compile and self.backbone == "top":
            raise ValueError("compile=true contradicts backbone=top, which swaps the layers below for stored states")
        if "all-linear" in self.lora_targets and len(self.lora_targets) > 1:
            raise ValueError(f"lora_targets: all-linear stands alone, found {', '.join(self.lora_targets)}")
        if self.precision == "fp32" and "flash" in (self.attn_implementation or ""):
            raise ValueError(
                f"attn_implementation={self.attn_implementation} contradicts precision=fp32: flash attention computes "
                "in bf16 or fp16"
            )
        if self.group_size == 1 and not self.in_batch_negatives:
            raise ValueError("group_size=1 contradicts in_batch_negatives=false: no negative is left")

    def _check_data(self) -> None:
        weights = self.data_weights
        if weights is not None and (len(weights) != len(self.data) or not all(0 < weight <= 1e6 for weight in weights)):
            raise ValueError(
                f"data_weights must be {len(self.data)} numbers above 0 (at most 1e6), one for each entry of data; "
                f"found {list(weights)}"
            )
        for name in ("type_group_size", "type_batch_size"):
            sizes = getattr(self, name) or {}
            for alias in ALIASES.keys() & sizes.keys():
                if ALIASES[alias] in sizes:
                    raise ValueError(f"{name}: {alias} and {ALIASES[alias]} are one type: keep one")
                sizes = {ALIASES.get(kind, kind): size for kind, size in sizes.items()}
                object.__setattr__(self, name, sizes)
            for kind, size in sizes.items():
                if kind not in TYPES:
                    near = "".join(f"; did you mean {t}?" for t in difflib.get_close_matches(kind, TYPES, 1, 0.3))
                    raise ValueError(f"{name}: unknown type {kind!r}; types are {', '.join(TYPES)}{near}")
                least = 2 if name == "type_group_size" and kind in OWN_NEGATIVES_TYPES else 1
                if size < least:
                    raise ValueError(f"{name}: {kind} must be at least {least}, found {size}")
        if (self.type_group_size or {}).get("only_1neg", 1) > 2:
            raise ValueError("type_group_size: only_1neg takes one negative, so at most 2 passages")
        if self.streaming and self.cache_hidden and self.backbone in ("frozen", "top"):
            raise ValueError(
                f"streaming=true contradicts cache_hidden=true with backbone={self.backbone}, which needs all texts at "
                "once: set cache_hidden: false"
            )
        if self.false_negative_margin and self.mask_false_negatives != "teacher":
            raise ValueError(
                f"false_negative_margin={self.false_negative_margin} contradicts "
                f"mask_false_negatives={self.mask_false_negatives}: it goes with teacher"
            )

    def group_size_of(self, kind: str) -> int:
        """Passages per query of data of this type."""
        size = (self.type_group_size or {}).get(kind, self.group_size)
        return min(size, 2) if kind == "only_1neg" else size

    def batch_size_of(self, kind: str) -> int:
        """Queries per batch of data of this type, over all ranks."""
        return (self.type_batch_size or {}).get(kind, self.batch_size)

    def check_ranks(self, world_size: int) -> None:
        """Raises ValueError when a batch size cannot be shared out among the ranks."""
        sizes = {f"type_batch_size {kind}": size for kind, size in (self.type_batch_size or {}).items()}
        for name, size in {"batch_size": self.batch_size, **sizes}.items():
            if size % world_size:
                raise ValueError(f"{name}={size} must be a multiple of the {world_size} ranks")

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, for YAML and JSON."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values
