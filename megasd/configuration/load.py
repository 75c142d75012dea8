"""The configuration of a run: composes the rooms' sections, loads, extends, overrides, saves.

Values are laid over each other, the later one wins: the sections' own defaults, what the chosen
algorithm sets in other sections, its preset, the file that the config `extends`, the config
itself, `key=value` from the command line. Relative paths inside a config are relative to the
current working directory, `extends` to the file that says it. Every fault is reported at once.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megasd.algorithms import ALGORITHMS, Method, load_algorithm
from megasd.checkpoint.config import CheckpointConfig
from megasd.configuration import schema
from megasd.configuration.compare import CompareConfig
from megasd.configuration.written import plain, read_yaml
from megasd.data.config import ContextConfig, DataConfig
from megasd.evaluation.config import EvaluationConfig
from megasd.metrics.config import MetricsConfig
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megasd.process.errors import TryAgainError, may_pass
from megasd.rewards.config import RewardConfig
from megasd.rollout.config import RolloutConfig

COMMAND_LINE = "command line"
_KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")


@dataclass(frozen=True)
class RunConfig:
    """`run:` what the run is called, how long it is, where it lives."""

    name: str = "???"
    directory: str = "runs"  # the run folder is directory/name
    steps: int = 100  # rollout batches
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda when there is one, else cpu
    deterministic: bool = False  # on GPUs: kernels that add in a fixed order, at some cost


@dataclass(frozen=True)
class WatchdogConfig:
    """`watchdog:` when a run in which nothing happens is ended, to be started again."""

    factor: float = 10.0  # times the median time of a step, or of an evaluation; 0: never
    minimum_seconds: float = 600.0  # however short the steps are
    slow_seconds: float = 14400.0  # start, first step, first evaluation, waits for a checkpoint


@dataclass(frozen=True)
class Config:
    """Everything about a run. `algorithm` is the dataclass of the method itself."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    algorithm_name: str = ""  # `algorithm.name` in a file: a preset and its method share a class
    algorithm: Any = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


_SECTIONS: Mapping[str, Any] = {
    f.name: f.type for f in dataclasses.fields(Config) if not f.name.startswith("algorithm")
}


class ConfigError(ValueError):
    """All faults of a configuration, one sentence each: where, which key, what to do."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A configuration as far as it could be read, with its faults and where each key stands."""

    path: str  # the file to name for a key that nobody set
    config: Config | None  # None: some file could not be read, nothing can be said about the whole
    errors: list[str]
    sources: Mapping[str, str]  # dotted key -> the file that set it, or COMMAND_LINE
    faulty: frozenset[str]  # keys that `errors` is about: `config` holds no usable value there

    def source(self, key: str) -> str:
        return self.sources.get(key, self.path)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration; raises ConfigError with every fault of files and overrides.

    What only shows when sections are read together is validate.py's.
    """
    loaded = read_config(path, overrides)
    if loaded.errors or loaded.config is None:
        raise ConfigError(loaded.errors)
    return loaded.config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Like `load_config`, but faults come back beside the part that could be read."""
    composer = _Composer(str(path))
    layers, readable = _read_files(Path(path), composer.errors)
    layers += _read_overrides(overrides, composer.errors)
    config = composer.compose(layers) if readable else None
    return Loaded(
        path=str(path),
        config=config,
        errors=composer.errors,
        sources=composer.sources,
        faulty=frozenset(composer.faulty),
    )


def with_absolute_paths(config: Config) -> Config:
    """What it names stays found from any working directory. Relative paths are of this one."""
    there = os.path.abspath
    teacher = config.teacher.path
    return replace(
        config,
        run=replace(config.run, directory=there(config.run.directory)),
        model=replace(config.model, path=there(config.model.path)),
        data=replace(config.data, files=[*map(there, config.data.files)]),
        teacher=replace(config.teacher, path=None if teacher is None else there(teacher)),
        evaluation=replace(config.evaluation, files=[*map(there, config.evaluation.files)]),
    )


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that `load_config` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(to_container(config))))


def to_container(config: Config) -> dict[str, Any]:
    """Nested dicts and lists in the shape of a config file."""
    sections = dataclasses.asdict(config)
    sections["algorithm"] = {"name": sections.pop("algorithm_name"), **sections["algorithm"]}
    return sections


def differing_keys(one: Config, other: Config) -> list[str]:
    """The dotted keys at which two configurations differ, sorted."""
    both = map(with_absolute_paths, (one, other))
    left, right = (dict(_flatten(to_container(config))) for config in both)
    keys = sorted(left.keys() | right.keys())
    return [key for key in keys if key not in left or key not in right or left[key] != right[key]]


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def escaped(value: Any) -> Any:
    """Keeps text that holds "${" from being read back as an OmegaConf interpolation."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return value


# ---- from files and command line to layers -------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def _read_files(path: Path, errors: list[str]) -> tuple[list[_Layer], bool]:
    """The file and all it extends, furthest base first, and whether every one could be read."""
    layers: list[_Layer] = []
    visited: dict[Path, Path] = {}
    said_by = ""
    while True:
        if path.resolve() in visited:
            circle = " -> ".join(map(str, [*visited.values(), path]))
            errors.append(f"{said_by}: extends: a circle, {circle}; remove one of these `extends`")
            return layers, False
        visited[path.resolve()] = path
        try:
            values = _read_yaml(path, said_by)
        except ConfigError as error:
            errors.extend(error.errors)
            return layers, False
        base = values.pop("extends", None)
        layers.insert(0, _Layer(str(path), values))
        if base is None:
            return layers, True
        base = schema.as_meant(base, str)
        if not isinstance(base, str):
            errors.append(f"{path}: extends: got {base!r}; write the name of one config file")
            return layers, False
        said_by, path = str(path), path.parent / base


def _read_yaml(path: Path, said_by: str) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            OmegaConf.create(plain(values))  # whether each ${...} can be read
    except FileNotFoundError as error:
        where = f"{said_by}: extends: " if said_by else ""
        relative = "; the name is relative to the file that extends it" if said_by else ""
        raise ConfigError(
            [f"{where}there is no config file {path}; check the name{relative}"]
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        fault = f"{path}{line}: not valid YAML: {error.problem}; correct the syntax there"
        raise ConfigError([fault]) from error
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {_interpolation_fault(error)}"]) from error
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        fault = f"{path}: cannot be read as a config file ({error}); give a YAML text file"
        if isinstance(error, OSError) and may_pass(error):
            raise TryAgainError(f"{path}: cannot be read now ({error}); try again") from error
        raise ConfigError([fault]) from error
    if isinstance(values, list):
        raise ConfigError([f"{path}: holds a list; a config file holds sections, like `run:`"])
    if not isinstance(values, dict | None):
        fault = (
            f"{path}: cannot be read as a config file (it holds one value); give a YAML text file"
        )
        raise ConfigError([fault])
    return values or {}


def _read_overrides(overrides: Sequence[str], errors: list[str]) -> list[_Layer]:
    layers: list[_Layer] = []
    for item in overrides:
        key, equals, written = item.partition("=")
        if not equals:
            errors.append(
                f"{COMMAND_LINE}: {item}: not an override; write key=value, like run.steps=10"
            )
            continue
        try:
            value = read_yaml(written)
            OmegaConf.create([plain(value)])
            values = _at(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=0"])), value)
        except (
            *(yaml.YAMLError, OmegaConfBaseException),
            *(UnicodeEncodeError, RecursionError),  # half of a character; brackets without end
        ) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
            fault = problem or str(error).splitlines()[0]
            errors.append(f"{COMMAND_LINE}: {key}: not valid YAML ({fault}); quote the value")
            continue
        layers.append(_Layer(COMMAND_LINE, values))
    return layers


def _at(place: Any, value: Any) -> Any:
    """`value` in the place of the one leaf."""
    if not isinstance(place, dict):
        return value
    return {key: _at(inner, value) for key, inner in place.items()}


# ---- from layers to the configuration ------------------------------------------------------


class _Composer:
    """Lays values over the schema one by one, so that each fault is caught with its origin."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors: list[str] = []
        self.sources: dict[str, str] = {}
        self.faulty: set[str] = set()
        self.shape: Any = Config
        self.leaves: list[dict[str, Any]] = []  # by layer: the values that have a place, by key
        self.hints: dict[str, Any] = {}  # of the keys in `leaves`

    def compose(self, layers: list[_Layer]) -> Config:
        name, method = self._choose_algorithm(layers)
        sections = dict(_SECTIONS)
        if method is not None:
            sections["algorithm"] = method.cls
            defaults = {**method.sections, "algorithm": method.preset}
            layers = [_Layer(f"defaults of algorithm {name}", defaults), *layers]
        self.shape = dataclasses.make_dataclass(
            "Shape", [(key, hint, field(default_factory=hint)) for key, hint in sections.items()]
        )
        known = list(schema.known_keys(self.shape))
        for layer in layers:
            self.leaves.append({})
            self._walk(layer.source, layer.values, self.shape, known)
        try:
            tree = self._tree()
        except OmegaConfBaseException:
            self._take_out_wrong_types([layer.source for layer in layers])
            tree = self._tree()
        if self._report_interpolations(tree):
            tree = self._tree()
        return self._build(tree, name)

    def source(self, key: str) -> str:
        return self.sources.get(key, self.path)

    def _fault(self, source: str, key: str, sentence: str) -> None:
        self.errors.append(f"{source}: {key}: {sentence}")
        self.faulty.add(key)

    def _refuse(self, source: str, key: str, value: Any, hint: Any) -> None:
        self._fault(source, key, f"got {schema.shown(value)}; write {schema.describe(hint)}")

    def _choose_algorithm(self, layers: list[_Layer]) -> tuple[str, Method | None]:
        """Takes `algorithm.name` out of the layers; without a usable one there is no method."""
        name = None
        for layer in layers:
            section = layer.values.get("algorithm")
            if isinstance(section, dict) and "name" in section:
                name = str(section.pop("name"))
                self.sources["algorithm.name"] = layer.source
        if name is not None and name in ALGORITHMS:
            return name, load_algorithm(name)
        # Without the method nothing can be said about its fields.
        for layer in layers:
            layer.values.pop("algorithm", None)
        fault = "missing" if name is None else f"there is no algorithm {name!r}"
        nearest = schema.did_you_mean(name or "", ALGORITHMS)
        choice = f"{fault}{nearest}; choose one of " + ", ".join(ALGORITHMS)
        self._fault(self.source("algorithm.name"), "algorithm.name", choice)
        return "", None

    def _walk(
        self, source: str, node: Mapping[str, Any], owner: Any, known: list[str], prefix: str = ""
    ) -> None:
        """Keeps every value of a layer that has a place in the schema."""
        hints = schema.fields_of(owner)
        for name, value in node.items():
            key = f"{prefix}{name}"
            if name not in hints:
                advice = schema.did_you_mean(key, known) or "; known here: " + ", ".join(hints)
                self._fault(source, key, f"unknown key{advice}")
                continue
            section = schema.section_of(hints[name])
            says_all = value == {} and schema.is_optional(hints[name])  # by its defaults, not null
            if section is not None and isinstance(value, Mapping) and not says_all:
                self._walk(source, value, section, known, f"{key}.")
            elif schema.is_list_of_lists(value, hints[name]):  # OmegaConf lets it pass
                self._refuse(source, key, value, hints[name])
            elif section is None or value is not None or schema.is_optional(hints[name]):
                self.sources[key] = source
                self.hints[key] = hints[name]
                self.leaves[-1][key] = schema.as_meant(value, hints[name])
            # Otherwise it is a section left empty, which says nothing.

    def _tree(self) -> Any:
        layers = [{k: v for k, v in layer.items() if k not in self.faulty} for layer in self.leaves]
        return OmegaConf.merge(OmegaConf.structured(self.shape), *map(schema.nested, layers))

    def _take_out_wrong_types(self, sources: list[str]) -> None:
        """One by one: OmegaConf stops at the first."""
        sections = schema.fields_of(self.shape)
        for source, layer in zip(sources, self.leaves, strict=True):
            for key, value in list(layer.items()):
                section, _, rest = key.partition(".")
                owner, inside = (sections[section], rest) if rest else (self.shape, section)
                try:
                    OmegaConf.merge(OmegaConf.structured(owner), schema.nested({inside: value}))
                    self.faulty.discard(key)
                except OmegaConfBaseException:
                    del layer[key]
                    self._refuse(source, key, value, self.hints[key])

    def _report_interpolations(self, tree: Any) -> bool:
        """True if there was one to report."""
        before = len(self.errors)
        for key in [key for key in self.hints if key not in self.faulty]:
            try:
                if OmegaConf.is_config(value := OmegaConf.select(tree, key)):
                    OmegaConf.to_container(value, resolve=True)
            except OmegaConfBaseException as error:
                self._fault(self.source(key), key, _interpolation_fault(error))
        return len(self.errors) > before

    def _fill_missing(self, tree: Any) -> Any:
        """The tree with empty text where something mandatory is missing, which is a fault."""
        for key in sorted(OmegaConf.missing_keys(tree)):
            if not is_within(key, self.faulty):
                remedy = f"set it in the file, or on the command line as {key}=..."
                self._fault(self.source(key), key, f"missing; {remedy}")
            tree = OmegaConf.merge(tree, schema.nested({key: ""}))
        return tree

    def _build(self, tree: Any, name: str) -> Config:
        """What a section's own __post_init__ refuses is taken back, until it accepts the rest."""
        tree = self._fill_missing(tree)
        sections: dict[str, Any] = {}
        for section in map(str, tree):
            while section not in sections:
                try:
                    sections[section] = OmegaConf.to_object(tree[section])
                except ValueError as error:
                    if not self._blame(section, str(error)):
                        raise  # the defaults themselves: no fault of the user's
                    tree = self._fill_missing(self._tree())
        return Config(algorithm_name=name, **sections)

    def _blame(self, section: str, sentence: str) -> bool:
        """Reports what a section said about itself; True if some value of the user is behind it."""
        values = [
            key for key in self.hints if key.startswith(f"{section}.") and key not in self.faulty
        ]
        named = keys_in(sentence)
        blamed = [key for key in values if key in named] or values
        if blamed:
            self.errors.append(f"{self.source(blamed[0])}: {sentence}")
            self.faulty.update(blamed)
        return bool(blamed)


def keys_in(sentence: str) -> set[str]:
    """The dotted config keys that a sentence names."""
    return set(_KEY.findall(sentence))


def is_within(key: str, keys: Iterable[str]) -> bool:
    """True if `keys` holds the key or a section that it stands in."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _interpolation_fault(error: Exception) -> str:
    fault = str(error).splitlines()[0]
    return f"the reference ${{...}} cannot be followed ({fault}); for a literal ${{ write \\${{"
