"""Settings: what a training recipe holds, and how `--set field=value` changes one field of it or of a model's config.

Every model file has a frozen dataclass `<Model>Config` (the architecture; it travels in the checkpoint) and a `RECIPE`
(the paper's optimiser, schedule and augmentation). Both are plain data: read them top to bottom, no registry behind them.
"""
import dataclasses
import difflib
import numbers
import types
import typing


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained. Each model file holds its paper's values and says where they come from."""

    epochs: int = 12
    batch_size: int = 2
    optimizer: str = "sgd"                    # sgd | adam | adamw
    lr: float = 0.02                          # for `lr_batch_size` pictures a step; scaled linearly to the actual batch
    lr_batch_size: int = 16                   # 0: the rate is taken as it stands
    momentum: float = 0.9                     # sgd only
    weight_decay: float = 1e-4
    schedule: str = "step"                    # step | cosine | constant | plateau
    milestones: tuple[int, ...] = ()          # epochs at which `step` multiplies the rate by `gamma`
    gamma: float = 0.1
    plateau_patience: int = 5                 # epochs without a lower validation loss after which `plateau` multiplies the rate
    plateau_factor: float = 0.5               # ... by this
    warmup_iters: int = 500                   # linear warm-up, steps; cut to a third of the run when the run is short
    clip_grad_norm: float = 0.0               # 0: off
    ema_decay: float = 0.0                    # 0: off
    hflip: float = 0.5                        # probability
    rotate: float = 0.0                       # degrees, uniform in [-rotate, rotate]
    vflip: float = 0.0                        # probability
    rot90: float = 0.0                        # probability of a turn by 90, 180 or 270 degrees (where no square, a third of it: of 180)
    shift: float = 0.0                        # share of width and height, uniform in [-shift, shift]
    scale: float = 0.0                        # factor, uniform in [1 - scale, 1 + scale]
    shift_scale_rotate: float = 1.0           # probability that a picture is shifted, scaled and rotated at all
    brightness: float = 0.0                   # factor, uniform in [1 - brightness, 1 + brightness]
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0                          # share of the colour circle, uniform in [-hue, hue]
    noise: float = 0.0                        # Gaussian, a pixel and channel; its standard deviation is uniform in [0, noise] of 0..255
    score_train: int = 0                      # training pictures scored after each epoch as the validation part is: train/ metrics; 0: off
    jitter_scale: tuple[float, ...] = ()      # large-scale jitter: a factor between the two, then cut or padded to the size before; (): off
    multi_scale: tuple[int, ...] = ()         # detectors: shorter sides, one drawn a picture for min_size, max_size in proportion; (): off
    select_by: str = ""                       # the metric that picks best.pt, named as in metrics.csv; "": validation.default_metric


def apply_settings(config, settings):
    """Returns a copy of a frozen dataclass with `--set` strings applied.

    config: a frozen dataclass instance. settings: list of "field=value" strings; the value is parsed by the field's type
    (bool: true/false/1/0/on/off; tuples: comma separated, no brackets needed).
    Raises ValueError naming the nearest field for an unknown key, and what was expected for a value that does not parse.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    for setting in settings:
        key, sep, text = setting.partition("=")
        if not sep:
            raise ValueError(f"--set expects field=value, got {setting!r}; for example --set epochs=12")
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)
            raise ValueError(f"--set {setting}: {type(config).__name__} has no field {key!r}; did you mean {near[0]!r}? "
                             f"Fields: {', '.join(hints)}")
        changes[key] = parse_value(text, hints[key], key)
    return dataclasses.replace(config, **changes)


def parse_value(text, hint, key):
    """Parses one `--set` value by its field's type hint; raises ValueError with expected and got."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):                       # Optional[...]
        if text.lower() in ("none", ""):
            return None
        return parse_value(text, next(a for a in args if a is not type(None)), key)
    if origin is tuple:
        parts = [p for p in text.strip("()[] ").split(",") if p.strip()]
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(parse_value(p.strip(), args[0], key) for p in parts)
        if len(parts) != len(args):
            raise ValueError(f"--set {key}: expected {len(args)} comma-separated values, got {text!r}")
        return tuple(parse_value(p.strip(), a, key) for p, a in zip(parts, args))
    if hint is bool:
        if text.lower() in ("true", "1", "on", "yes"):
            return True
        if text.lower() in ("false", "0", "off", "no"):
            return False
        raise ValueError(f"--set {key}: expected true or false, got {text!r}")
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"--set {key}: expected {hint.__name__}, got {text!r}") from None


def from_dict(cls, values):
    """Rebuilds a config dataclass from a checkpoint's dict (lists become tuples); raises ValueError on unknown fields, and for a value of
    another type than its field's."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}: the checkpoint was written by another version; "
                         f"known fields: {', '.join(sorted(names))}")
    tuples = lambda v: tuple(tuples(x) for x in v) if isinstance(v, (list, tuple)) or getattr(v, "ndim", 0) else v
    values = {k: tuples(v) for k, v in values.items()}
    for name, hint in typing.get_type_hints(cls).items():
        if name in values and not _is_of(values[name], hint):
            kind = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{name}: expected {kind}, got {values[name]!r} ({type(values[name]).__name__})")
    return cls(**values)


def _is_of(value, hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, kind) for kind in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(each, args[0]) for each in value)
    if hint is bool:
        return not isinstance(value, (str, tuple)) and value in (0, 1)                    # of any kind: numpy's True is equal to 1
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, hint)
