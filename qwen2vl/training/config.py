"""The configuration of a training run: a TOML file with one table for each concern, every key checked and typed.

Relative paths are taken from the folder of the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Qwen2VLError
from ..files import read_text
from ..prompt.limits import limit_keywords
from .errors import TrainingConfigError
from .loss import KINDS as LOSSES

#: The optimizers that `optimizer.kind` names.
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained. Either ``checkpoint``, or ``config`` with parts to begin from; the rest is drawn at random."""

    checkpoint: str | None = None  # Qwen2-VL: a folder or hub id
    config: str | None = None  # "2b", "7b", "72b", or a folder with a config.json
    llm: str | None = None  # Qwen2 text checkpoint, a folder or hub id
    tower: str | None = None  # CLIP vision checkpoint (transformers' layout), a folder or hub id
    processor: str | None = None  # folder or hub id of a Qwen2-VL tokenizer and image settings; default the checkpoint
    dtype: str = "bfloat16"
    master_weights: bool = True  # the optimiser keeps float32 copies of 16-bit parameters


@dataclass(frozen=True)
class RunConfig:
    """How long, how much at a time, and what is written where."""

    output: str
    steps: int | None = None
    epochs: float | None = None  # in the place of steps: passes over the entry of the data that is read the fastest
    max_tokens: int = 8192  # of one pack on one rank
    accumulation: int = 1  # packs a rank takes for one step
    lookahead: int = 64  # samples that packing chooses from
    seed: int = 0
    max_bad: int = 100  # malformed samples, or unreadable media, of a rank before it stops; 0: the first stops it
    data_threads: int = 2  # that prepare samples ahead, on every rank
    allow_remote: bool = False  # fetch shards and media from http(s)
    save_every: int = 500
    keep: int = 3  # checkpoints
    loss: str = "chunked"
    checkpoint_activations: bool = True
    compile: bool = False
    peak_tflops: float | None = None  # of one device in the model's dtype, for MFU
    tensorboard: bool = False
    plot: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """A part's rate defaults to ``lr``. Norms and biases do not decay."""

    kind: str = "adamw"  # or "muon": Muon for the matrices of layers, AdamW for the rest
    lr: float = 1e-5
    lr_tower: float | None = None
    lr_merger: float | None = None
    lr_llm: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0  # of the peak, where the cosine ends
    clip: float | None = 1.0  # largest norm of all gradients together


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work. ``mode`` defaults to "fsdp" under torchrun, else "none"."""

    mode: str | None = None
    tensor: int = 1  # ranks that split the decoder's layers
    timeout: float = 1800.0  # seconds after which a rank that waits for the others gives up


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of the decoder's linear layers, of the tower's if ``tower``, and of routed experts if ``experts``;
    everything else is frozen."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tower: bool = False
    experts: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run. ``data`` is handed to the readers, entry by entry."""

    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig | None = None
    data: tuple[dict[str, Any], ...] = ()
    limits: dict[str, Any] = field(default_factory=dict)  # of the processor by name, see prompt.limits

    def __post_init__(self) -> None:
        for ok, key, wants, got in _rules(self):
            if not ok:
                raise TrainingConfigError(f"{key}: must be {wants}, got {got!r}")
        if (self.model.checkpoint is None) == (self.model.config is None):
            raise TrainingConfigError("model.checkpoint: give either it or model.config, not both and not neither")
        if (self.run.steps is None) == (self.run.epochs is None):
            raise TrainingConfigError("run.steps: give either it or run.epochs, not both and not neither")
        for key in ("llm", "tower"):
            if self.model.checkpoint is not None and getattr(self.model, key) is not None:
                raise TrainingConfigError(f"model.{key}: the whole model comes from model.checkpoint; drop one of them")
        if not isinstance(self.limits, dict):
            raise TrainingConfigError(f"limits: must be a table, [limits], got {self.limits!r}")
        try:
            limit_keywords(self.limits)
        except Qwen2VLError as error:
            raise TrainingConfigError(f"limits: {error}") from None
        if self.lora is not None and self.lora.experts and (got := self.lora.dropout):
            raise TrainingConfigError(f"lora.dropout: must be 0 with lora.experts, whose weights are summed, got {got}")
        if self.lora is not None and self.parallel.tensor > 1:
            raise TrainingConfigError("lora: adapters and parallel.tensor > 1 do not go together")

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainingConfig:
        """Read a file. Raises :class:`TrainingConfigError` naming the file and the key."""
        path = Path(path)
        try:
            tables = tomllib.loads(read_text(path))
        except CheckpointError as error:  # as of any file that is read whole
            raise TrainingConfigError(str(error)) from error
        except (ValueError, RecursionError) as error:  # a ValueError too for a number of thousands of digits
            raise TrainingConfigError(f"{path}: cannot be read as TOML: {error}") from error
        try:
            # Absolute, so that a run is the same from whatever folder it is resumed.
            return cls.from_dict(tables, folder=path.parent.resolve())
        except TrainingConfigError as error:
            raise TrainingConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, tables: dict[str, Any], folder: Path | None = None) -> TrainingConfig:
        """``tables`` as TOML gives them; ``folder``: where relative paths begin."""
        sections = {
            "run": RunConfig,
            "model": ModelConfig,
            "optimizer": OptimizerConfig,
            "parallel": ParallelConfig,
            "lora": LoraConfig,
        }
        if unknown := sorted(set(tables) - set(sections) - {"limits", "data"}):
            raise TrainingConfigError(f"{unknown[0]}: unknown table; there are {', '.join(sections)}, limits and data")
        values: dict[str, Any] = {
            name: _section(kind, name, tables) for name, kind in sections.items() if name in tables
        }
        if "run" not in values:
            raise TrainingConfigError("run: the table is missing; it needs output, and steps or epochs")
        data = tables.get("data", [])
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise TrainingConfigError(f"data: must be tables, [[data]], got {data!r}")
        config = cls(**values, data=tuple(data), limits=tables.get("limits", {}))
        return config if folder is None else _anchored(config, folder)


def _rules(c: TrainingConfig):
    """(holds, key, what it must be, what it is) of every range."""
    r, o, m, p = c.run, c.optimizer, c.model, c.parallel
    for key in ("steps", "epochs", "max_tokens", "accumulation", "lookahead", "save_every", "keep"):
        value = getattr(r, key)
        yield value is None or value > 0, f"run.{key}", "positive", value
    for key in ("seed", "max_bad", "data_threads"):
        yield getattr(r, key) >= 0, f"run.{key}", "zero or positive", getattr(r, key)
    yield r.loss in LOSSES, "run.loss", f"one of {', '.join(LOSSES)}", r.loss
    yield r.peak_tflops is None or r.peak_tflops > 0, "run.peak_tflops", "positive", r.peak_tflops
    yield m.dtype in ("bfloat16", "float32"), "model.dtype", "bfloat16 or float32", m.dtype
    for key in ("lr", "lr_tower", "lr_merger", "lr_llm"):
        value = getattr(o, key)
        yield value is None or value >= 0, f"optimizer.{key}", "zero or positive", value
    yield o.kind in OPTIMIZERS, "optimizer.kind", f"one of {', '.join(OPTIMIZERS)}", o.kind
    yield all(0 <= b < 1 for b in o.betas), "optimizer.betas", "in [0, 1)", o.betas
    yield o.eps > 0, "optimizer.eps", "positive", o.eps
    yield o.weight_decay >= 0, "optimizer.weight_decay", "zero or positive", o.weight_decay
    within = "zero or positive" if r.steps is None else f"in [0, {r.steps}], run.steps"
    fits = 0 <= o.warmup_steps <= (o.warmup_steps if r.steps is None else r.steps)
    yield fits, "optimizer.warmup_steps", within, o.warmup_steps
    yield 0 <= o.min_lr_ratio <= 1, "optimizer.min_lr_ratio", "in [0, 1]", o.min_lr_ratio
    yield o.clip is None or o.clip > 0, "optimizer.clip", "positive", o.clip
    yield p.mode in (None, "none", "ddp", "fsdp"), "parallel.mode", "none, ddp or fsdp", p.mode
    yield p.tensor > 0, "parallel.tensor", "positive", p.tensor
    yield p.timeout > 0, "parallel.timeout", "positive", p.timeout
    if c.lora is not None:
        yield c.lora.rank > 0, "lora.rank", "positive", c.lora.rank
        yield c.lora.alpha > 0, "lora.alpha", "positive", c.lora.alpha
        yield 0 <= c.lora.dropout < 1, "lora.dropout", "in [0, 1)", c.lora.dropout
        yield bool(c.lora.targets), "lora.targets", "at least one name", c.lora.targets


def _section(kind: type, name: str, tables: dict[str, Any]) -> Any:
    table = tables[name]
    if not isinstance(table, dict):
        raise TrainingConfigError(f"{name}: must be a table, [{name}], got {table!r}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(table) - set(known)):
        raise TrainingConfigError(f"{name}.{unknown[0]}: unknown key; there are {', '.join(known)}")
    for key, f in known.items():
        if key not in table and f.default is MISSING and f.default_factory is MISSING:
            raise TrainingConfigError(f"{name}.{key}: is missing")
    return kind(**{key: _value(f"{name}.{key}", str(known[key].type), value) for key, value in table.items()})


def _value(key: str, wanted: str, value: Any) -> Any:
    """``value`` as the annotation ``wanted`` says. TOML knows no null: what may be None is left out."""
    wanted = wanted.removesuffix(" | None")
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted == "float" and real:
        return float(value)
    if (wanted == "int" and real and isinstance(value, int)) or (wanted == "bool" and isinstance(value, bool)):
        return value
    if wanted == "str" and isinstance(value, str):
        return value
    if wanted.startswith("tuple[") and isinstance(value, list):
        kinds = wanted.removeprefix("tuple[").removesuffix("]").split(", ")
        if kinds[-1] == "...":
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            return tuple(_value(key, kind, item) for kind, item in zip(kinds, value, strict=True))
    raise TrainingConfigError(f"{key}: must be {_WORDS[wanted]}, got {value!r}")


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "tuple[float, float]": "two numbers",
    "tuple[str, ...]": "a list of strings",
}


def _anchored(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """Relative paths taken from ``folder``. What ``model`` names may be a hub id or preset: only what exists moves."""

    def below(path: str) -> str:
        return path if "://" in path else str(folder / Path(path).expanduser())

    def there(name: str | None) -> str | None:
        return below(name) if name is not None and Path(below(name)).exists() else name

    def entry(table: dict[str, Any]) -> dict[str, Any]:
        moved = dict(table)
        if table.get("format") == "generated":  # whose path names skills
            return moved
        for key in ("path", "media_root"):  # anything but text is the readers' to refuse
            value = moved.get(key)
            if isinstance(value, str):
                moved[key] = below(value)
            elif isinstance(value, list):
                moved[key] = [below(item) if isinstance(item, str) else item for item in value]
        return moved

    names = ("checkpoint", "config", "llm", "tower", "processor")
    return replace(
        config,
        model=replace(config.model, **{name: there(getattr(config.model, name)) for name in names}),
        run=replace(config.run, output=below(config.run.output)),
        data=tuple(entry(table) for table in config.data),
    )
