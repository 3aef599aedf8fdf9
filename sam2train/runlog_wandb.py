"""One run in Weights & Biases, and in TensorBoard where that is asked for: whether, how it starts,
and that its failure stops nothing.

The first exception out of one of them is one line on the console, then it is off for the rest of
the run.
"""

import contextlib
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from sam2train.config import Section, flatten
from sam2train.errors import UserError
from sam2train.files import printable
from sam2train.run_folder import RunFolder

Mode = Literal["online", "offline", "disabled"]

STEP_AXIS = "trainer/global_step"
BEST_METRIC = "val/J_and_F"
INIT_TIMEOUT = 20.0  # seconds; without a network an online start fails after about this long
FINISH_TIMEOUT = 120.0  # seconds; W&B's own default waits for the server without limit
FLUSH_INTERVAL = 2.0  # seconds; a run that is killed loses this much, with W&B's default 15
# `shared` is several writers of one online run; the other two are W&B's old names.
OTHER_MODES: dict[str, Mode] = {"shared": "online", "run": "online", "dryrun": "offline"}


class TrackingConfig(Section):
    """Where a run reports to besides its own folder. `mode: null` lets `choose_mode` decide."""

    mode: Mode | None = Field(
        None,
        description="null: WANDB_MODE, else what `wandb offline` or `wandb disabled` set, else "
        "online where there is an API key and offline where there is none",
    )
    # The pattern leaves out the characters that W&B refuses in a project's name.
    project: str = Field(
        "sam2train", pattern=r"^[^/\\#?%:]+$", max_length=128, description="W&B's project"
    )
    entity: str | None = Field(None, description="W&B's user or team; null: that of the key")
    name: str | None = Field(None, description="of the run in W&B; null: the experiment's")
    group: str | None = Field(None, description="of runs that W&B shows together")
    notes: str | None = Field(None, description="a text of yours beside the run in W&B")
    tags: tuple[str, ...] = Field(
        (), description="of the run in W&B, besides its data format and prompts"
    )
    log_model: Literal["best", "all"] | None = Field(
        None,
        description="weights in W&B: best: best.pt when the run is done; all: each checkpoint when "
        "it is written, too",
    )
    also: tuple[Literal["tensorboard"], ...] = Field((), description="writers besides W&B")


def choose_mode(config: TrackingConfig) -> tuple[Mode, str]:
    """The W&B mode of a run and, in words, why.

    The first of these that is set decides: `tracking.mode`, WANDB_MODE, what `wandb offline` or
    `wandb disabled` wrote in this folder, credentials. Online without usable credentials becomes
    offline: W&B would ask for a key on the terminal and wait for ever.
    """
    mode, reason = config.mode, f"tracking.mode is {config.mode}"
    if mode is None and (named := os.environ.get("WANDB_MODE")):
        mode, reason = OTHER_MODES.get(named, named), f"WANDB_MODE={named}"
        if mode not in get_args(Mode):  # W&B then refuses to start, offline too
            return "disabled", f"{reason} is none of {', '.join(get_args(Mode))}"
    if mode in ("offline", "disabled"):
        return mode, reason

    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if mode is None and settings.mode in ("offline", "disabled"):
        return settings.mode, f"`wandb {settings.mode}` was run in this folder"
    remembered, settings.mode = settings.mode, "online"  # login() returns False in offline mode
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return "offline", f"the key cannot be used: {first_line(error)}"
    finally:
        settings.mode = remembered
    if found:
        return "online", reason if mode else "a key was found"
    missing = "no key was found; `wandb login` stores one"
    return "offline", f"{reason}, but {missing}" if mode else missing


class WandbRun:
    """A run as W&B knows it.

    Args:
        config: the `tracking:` section.
        folder: W&B writes below it.
        settings: of the experiment.
        say: prints one line.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        *,
        run_id: str,
        name: str,
        settings: dict[str, Any],
        job_type: str,
        say: Callable[[str], None],
    ) -> None:
        self.mode: Mode = "disabled"
        self.how_to_sync: str | None = None  # the command that uploads what lies on disk only
        self.reporting = False  # from a start that worked to the first exception
        self._config, self._folder, self._say = config, folder, say
        self._run_id, self._settings, self._job_type = run_id, settings, job_type
        self._experiment, self._name = name, config.name or run_name(name, settings)
        # The best value of a run is what W&B's tables show. A sweep steers by the last one.
        self.shows_best = "WANDB_SWEEP_ID" not in os.environ
        self._run: Any = None  # wandb.Run

    def start(self) -> None:
        """Begin to report, and say where to; offline where going online fails."""
        try:
            mode, reason = choose_mode(self._config)
            if mode == "disabled":
                self._say(f"W&B is off: {reason}")
                return
            try:
                self._init(mode)
            except Exception as error:
                if mode == "offline":
                    raise
                import wandb

                wandb.teardown()  # else W&B refuses the run id of the failed start
                reason = f"going online failed: {first_line(error)}"
                self._init("offline")
        except Exception as error:
            self._say(f"W&B is off, it did not start ({type(error).__name__}: {first_line(error)})")
            return
        self.reporting = True
        folder = shlex.quote(str(self._folder.wandb / Path(self._run.dir).parent.name))
        if self.mode == "offline":
            self.how_to_sync = f"wandb sync {folder}"
            self._say(f"W&B is offline: {reason}. Upload later:\n  {self.how_to_sync}")
        else:
            self._sync_broken = f"wandb sync --include-online {folder}"
            self._say(f"W&B is online: {reason}. {self._run.url}")

    def _init(self, mode: Mode) -> None:
        import wandb
        from wandb.sdk.lib import import_hooks

        wandb.setup(wandb.Settings(silent=True))
        self._run = wandb.init(
            mode=mode,
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=run_tags(self._config.tags, self._settings),
            notes=self._config.notes,
            name=printable(self._name),
            id=self._run_id,
            dir=str(self._folder.path),
            config=self._settings
            | list_texts(self._settings)
            | {"text/experiment": printable(self._experiment)},
            job_type=self._job_type,
            resume="allow",
            reinit="create_new",  # never a run of other code that was left open
            settings=wandb.Settings(
                silent=True,
                console="wrap",  # what is printed stands in the tab Logs
                save_code=True,  # with what git says has changed
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=FLUSH_INTERVAL,
            ),
        )
        self.mode = mode
        # They tell W&B which packages are imported later, and raise in a forked loader process.
        import_hooks.unregister_all_post_import_hooks()
        # An axis of our own and never `step=`, which drops rows below the current step.
        self._run.define_metric(STEP_AXIS)
        self._run.define_metric("*", step_metric=STEP_AXIS)
        if self.shows_best:
            self._run.define_metric(BEST_METRIC, step_metric=STEP_AXIS, summary="max")

    def alert(self, error: BaseException) -> None:
        """Tell whoever follows the run that it failed."""
        title, text = f"{printable(self._name)} failed", f"{type(error).__name__}: {error}"
        self.report("alert", lambda run: run.alert(title, printable(text)[:1000], level="ERROR"))

    def log_model(
        self, path: Path, aliases: Sequence[str], data: Mapping[str, str], *, copy: bool
    ) -> None:
        """Send a checkpoint as a version of the artifact `model-<run id>`, made from data with
        these fingerprints.

        Args:
            data: split -> fingerprint.
            copy: the file will be written again before the run ends.
        """

        def send(run: Any) -> None:
            import wandb

            for split, fingerprint in data.items():
                about = {"split": split, "fingerprint": fingerprint}
                used = wandb.Artifact(f"data-{fingerprint[:16]}", type="dataset", metadata=about)
                with used.new_file("data.json") as file:
                    file.write(json.dumps(about))
                # `use_artifact` does this, and waits for the server without limit.
                run._log_artifact(used, is_user_created=True, use_after_commit=True)
            model = wandb.Artifact(
                f"model-{self._run_id}", type="model", metadata={"data": dict(data)}
            )
            policy = "mutable" if copy else "immutable"
            model.add_file(str(path), name=path.name, policy=policy, skip_cache=True)
            run.log_artifact(model, aliases=list(aliases))

        self.report("the model", send)

    def report(self, what: str, call: Callable[[Any], object]) -> None:
        """Run one W&B call; its first exception ends the reporting, not the training."""
        if not self.reporting:
            return
        try:
            call(self._run)
        except Exception as error:
            self.reporting = False
            self.how_to_sync = self.how_to_sync or self._sync_broken
            self._say(
                f"W&B is off from here, {what} failed ({type(error).__name__}: "
                f"{first_line(error)}); {self._folder.path} goes on. Upload what W&B has:\n"
                f"  {self.how_to_sync}"
            )

    def finish(self, code: int) -> None:
        """End the run with the exit code of its process."""
        if self.reporting:
            self.report("finish", lambda run: run.finish(exit_code=code))
            self.reporting = False
        elif self._run is not None:  # reporting failed before; this still writes what W&B holds
            with contextlib.suppress(Exception):
                self._run.finish(exit_code=code)


class TensorBoardRun:
    """A run as TensorBoard reads it.

    Args:
        folder: gets its files.
        first_step: of a resumed run; what lies there of later steps is hidden.
        say: prints one line.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tracking.also: tensorboard is not installed; `pip install tensorboard` does that, "
                "or leave it out"
            ) from None
        self._say, self._folder = say, folder
        purge = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of one line; those that are not finite are left out."""

        def write(writer: Any) -> None:
            for name, value in plain_values(scalars, finite=True).items():
                if value is not None:
                    writer.add_scalar(name, value, step)

        self._do(write)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Write a picture (H, W, 3) uint8."""
        self._do(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        self._do(lambda writer: writer.close())

    def _do(self, call: Callable[[Any], object]) -> None:
        if self._writer is None:
            return
        try:
            call(self._writer)
        except Exception as error:
            self._writer = None
            self._say(f"TensorBoard is off from here, {self._folder}: {first_line(error)}")


def run_name(name: str, settings: Mapping[str, Any]) -> str:
    """`coco_point_bbox point+bbox s0`: the experiment, the prompts and the seed."""
    dataset, trainer = settings.get("dataset", {}), settings.get("trainer", {})
    parts = [name, "+".join(dataset.get("prompt_types", ()))]
    parts += [f"s{trainer['seed']}"] if "seed" in trainer else []
    return " ".join(filter(None, parts))


def run_tags(own: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The user's tags, then the data format and the prompts; W&B takes 64 characters of each."""
    dataset = settings.get("dataset", {})
    found = [*own, dataset.get("dataset_type"), *dataset.get("prompt_types", ())]
    return [*dict.fromkeys(printable(tag)[:64] for tag in found if tag)]


def list_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """`text/<dotted name>` -> a text such as `point+bbox` for each setting that is a list: W&B
    draws and groups by scalars only."""
    lists = {n: v for n, v in flatten(settings).items() if isinstance(v, list | tuple)}
    return {f"text/{name}": "+".join(map(str, items)) for name, items in lists.items()}


def plain_values(value: Any, *, finite: bool = False) -> Any:
    """The value with Python numbers for tensors and NumPy scalars, at any depth.

    `finite` makes None of NaN and infinities: JSON cannot hold them, and pandas reads null as NaN.
    """
    if isinstance(value, Mapping):
        return {str(name): plain_values(item, finite=finite) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item, finite=finite) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
