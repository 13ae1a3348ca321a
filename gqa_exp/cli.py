"""Hydra with typed configuration, checks before anything runs, and one clear line for bad input.

Hydra composes `conf/` onto the dataclasses of `gqa_exp.config`; here its errors become `InputError` with the nearest
known name, and a sweep is checked point by point before its first point starts.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gqa_exp.config import Config, check
from gqa_exp.errors import EXIT_BAD_INPUT, InputError, one_line, suggest
from gqa_exp.host import resolve_number_formats
from gqa_exp.pipeline.parallel import run_points

Plugins.instance()  # loads Hydra's plugins anew: a class taken from their modules before that is no longer theirs

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
"""The repository: conf/ and sweeps/ are beside the package (an editable install is the one supported way)."""

PARALLEL_LAUNCHER = "hydra_plugins.gqa_exp.ParallelLauncher"

ALIKE = ("output", "sweep", "timing")
"""Fields that the points of a sweep must have alike."""
sweep_points: list[Config] = []
"""The checked points of the sweep that this process runs, for planning and closing it."""


def setup() -> None:
    """Make the typed schema, the sweeper and the repository's folders known to Hydra."""
    os.environ["GQA_EXP_ROOT"] = str(ROOT)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="hydra/sweeper", name="checked", node=CheckedSweeperConfig, provider="gqa_exp")
    store.store(group="hydra/launcher", name="parallel", node=ParallelLauncherConfig, provider="gqa_exp")
    # Hydra takes plugins from the package "hydra_plugins" alone; giving this module a second name there spares a
    # top-level folder. Other plugins may have brought the package already.
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.gqa_exp = sys.modules[__name__]  # type: ignore[attr-defined]
    sys.modules["hydra_plugins.gqa_exp"] = sys.modules[__name__]
    for plugin in (CheckedSweeper, ParallelLauncher):
        plugin.__module__ = "hydra_plugins.gqa_exp"
        Plugins.instance().register(plugin)


@dataclass
class CheckedSweeperConfig:
    """What a sweep file may set under `hydra.sweeper`."""

    _target_: str = "hydra_plugins.gqa_exp.CheckedSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    """Field to its values, separated by commas; the sweep takes all combinations."""
    skip: list[Any] = field(default_factory=list)
    """Field values whose joint occurrence is left out, such as {num_kv_heads: 8, proportion: 0}."""


class CheckedSweeper(BasicSweeper):
    """Hydra's basic sweeper (all combinations), which checks every point first and can leave combinations out."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        skip: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Args as the basic sweeper's, and `skip`: field values whose joint occurrence is left out of the sweep."""
        super().__init__(max_batch_size, params)
        self.skip = [dict(pattern) for pattern in skip]

    def sweep(self, arguments: list[str]) -> Any:
        """Run all points in turn. What the command line says of a field replaces what the sweep file lists for it."""
        sweep_points.clear()
        given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
        self.params = {name: values for name, values in self.params.items() if name not in given}
        return super().sweep(arguments)

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """The next batch of points, without those to skip."""
        batch = super().get_job_batch()
        return [overrides for overrides in batch if not any(_matches(overrides, p) for p in self.skip)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose and check every point of the batch before the first one runs.

        Raises:
            InputError: the first point that is wrong, or what all points of a sweep must have alike differs.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        for overrides in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            sweep_points.append(to_config(composed))
            for name in ALIKE:
                if getattr(sweep_points[-1], name) != getattr(sweep_points[0], name):
                    raise InputError(
                        f"the points of a sweep differ in {name}, but share one timing job and one folder of rows, "
                        "which hold one time each; start a sweep for each value, with a sweep=NAME of its own"
                    )


@dataclass
class ParallelLauncherConfig:
    """What may be set under `hydra.launcher` with `hydra/launcher=parallel`."""

    _target_: str = PARALLEL_LAUNCHER
    points: int | None = None
    """How many at a time; None: one per GPU, or per CPU core."""


class ParallelLauncher(Launcher):
    """Runs the points of a sweep in processes of their own, several at a time: with trainer=gpu, one per GPU."""

    def __init__(self, points: int | None = None) -> None:
        """Args as `ParallelLauncherConfig`'s fields."""
        self.points = points

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`; the task function is not used, since points run in other processes."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of points.

        Raises:
            InputError: as `run_points`, or one of the points was refused.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        loader = self.hydra_context.config_loader
        configs = [to_config(loader.load_sweep_config(self.config, list(overrides))) for overrides in job_overrides]
        codes = run_points(configs, self.points, Path(self.config.hydra.sweep.dir) / "points", initial_job_idx)
        returns = []
        for overrides, code in zip(job_overrides, codes, strict=True):
            name = " ".join(overrides)
            if code == EXIT_BAD_INPUT:
                raise InputError(f"{name}: refused, for the reason above; points that were not begun were left out")
            done = JobReturn(overrides=list(overrides), status=JobStatus.FAILED if code else JobStatus.COMPLETED)
            done.return_value = RuntimeError(f"{name}: exit code {code}; its own output says why") if code else None
            returns.append(done)
        return returns


def _matches(overrides: Sequence[str], pattern: dict[str, Any]) -> bool:
    values = OmegaConf.from_dotlist([item for item in overrides if re.match(r"[\w.]+=", item)])
    return all(OmegaConf.select(values, name) == value for name, value in pattern.items())


def to_config(composed: DictConfig) -> Config:
    """The typed and checked configuration of one point.

    Raises:
        InputError: what `gqa_exp.config.check` refuses.
    """
    plain = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    check(config)
    resolve_number_formats(config)
    return config


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `gqa-run OVERRIDES` would run, checked.

    Raises:
        InputError: as the command would refuse.
    """
    setup()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return to_config(hydra.compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


class _Refused(BaseException):
    """Carries an `InputError` through Hydra, which would print lines of its own about any `Exception` of a job."""

    def __init__(self, error: InputError) -> None:
        super().__init__()
        self.error = error


def run_hydra(task: Callable[[Config], None]) -> None:
    """Run a task function under Hydra's command line.

    Raises:
        InputError: what Hydra or the checks refuse; an output folder that cannot be written.
    """
    setup()

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def main(composed: DictConfig) -> None:
        try:
            task(to_config(composed))
        except InputError as error:
            raise _Refused(error) from error

    try:
        main()
    except _Refused as refused:
        raise refused.error from None
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another output=FOLDER"
        ) from error


def explain(error: Exception) -> InputError:
    """One line for an error of Hydra or OmegaConf: what is wrong, where, and the nearest name that exists."""
    text = one_line(error)
    missing = re.search(r"Could not find '([\w/ -]+?)/([\w.-]+)'|Could not load '([\w/-]+?)/([\w.-]+)'", text)
    if isinstance(error, MissingConfigException) and missing:
        group, name = missing.group(1) or missing.group(3), missing.group(2) or missing.group(4)
        folder = ROOT / group if group == "sweeps" else ROOT / "conf" / group
        return InputError(
            f'{group}="{name}" is unknown; {suggest(name, [path.stem for path in folder.glob("*.yaml")])}'
        )
    unknown = re.search(r"Could not override '([\w.]+)'|[Kk]ey '([\w.]+)' (?:is )?not in", text)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
        return InputError(f'field "{name}" is unknown; {suggest(name, _field_names(Config()))}')
    if error.__cause__ is not None and text.startswith("Error merging override"):
        text = f"{text.removeprefix('Error merging override ')}: {one_line(error.__cause__)}"
    return InputError(re.sub(r" ?(full_key|object_type|reference_type)[:=].*", "", text))


def _field_names(config: object, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a nested configuration."""
    names = []
    for spec in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, spec.name)
        inner = _field_names(value, f"{prefix}{spec.name}.") if dataclasses.is_dataclass(value) else []
        names += [f"{prefix}{spec.name}", *inner]
    return names
