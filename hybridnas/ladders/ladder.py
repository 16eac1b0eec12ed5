"""A ladder from settings to verdict: plan, train, fit, draw; the same call again goes on where it stopped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.scaling_law import LEVEL
from hybridnas.config import plain
from hybridnas.errors import ConfigError, StudyError, suggest
from hybridnas.files import locked, write_json
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.ladders.config import FREE, LadderConfig
from hybridnas.ladders.rates import at_an_end, best_rates, tuning_runs
from hybridnas.ladders.rows import Row, ended, rows_of, write_rows
from hybridnas.ladders.verdict import Verdict, judge
from hybridnas.search.config import Budget
from hybridnas.search.named import named_budget
from hybridnas.study.folder import first_difference
from hybridnas.tracking.secrets import masked
from hybridnas.train.config import ANNEALED_LR_FRACTION
from hybridnas.units import duration, human, several

if TYPE_CHECKING:
    from hybridnas.ladders.plan import LadderRun, Plan
    from hybridnas.ladders.storage import SharedRuns
    from hybridnas.train.callbacks import Callback

FORMAT = 1
log = logging.getLogger("hybridnas.ladders")


@dataclass(frozen=True)
class LadderResult:
    """What a call of a ladder left: all rows so far, what they say, and the files."""

    folder: Path
    rows: tuple[Row, ...]
    verdict: Verdict
    rates: Mapping[str, float]  # each architecture's multiple of the law's rate
    done: bool  # whether every run has ended
    failed: tuple[str, ...]  # runs that failed, with the reason
    seconds: float
    figures: tuple[Path, ...]


def ladder(
    study: str | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> LadderResult:
    """Train architectures at growing size and fit scaling laws to them; the same call again goes on.

    ``study``: name or folder of a study, whose best and whose baselines are trained. ``settings``: fields of
    :class:`hybridnas.ladders.config.LadderConfig` (``presets=``, ``patterns=``, ``sizes=``, ``seeds=``, ``tokens=``,
    ``hold_out=``, ``runs=`` ...); ``budget`` and ``data`` also by name, and fields of the budget (``d_model=``,
    ``depth=``, ``seq_len=`` ...) by themselves. ``report`` gets lines of progress, by default the logger
    ``hybridnas.ladders``.

    >>> result = hybridnas.ladder(presets=["mamba", "transformer"], sizes=[1, 2, 4, 8])
    >>> for pair in result.verdict.pairs: print(pair.sentence())

    Raises ConfigError, MatchError or StudyError before anything is trained, KeyboardInterrupt after Ctrl-C.
    """
    own, sizes = set(LadderConfig.field_names()), set(Budget.field_names()) - set(LadderConfig.field_names())
    for key in settings:
        if key not in own | sizes:
            raise ConfigError(
                f"ladder has no setting {key!r}{suggest(key, own | sizes)}",
                field=key,
                got=settings[key],
                allowed=tuple(sorted(own | sizes)),
            )
    given = {key: value for key, value in settings.items() if key in own}
    changed = {key: value for key, value in settings.items() if key in sizes}
    if changed or given.get("budget") is not None:
        given["budget"] = {**named_budget(given.get("budget") or "laptop"), **changed}
    if isinstance(given.get("data"), str):
        given["data"] = {"kind": given["data"]}
    return Ladder(LadderConfig.from_dict({"study": study, **given})).run(callbacks, report=report)


class Ladder:
    """One ladder; :meth:`run` in the same or another process goes on where it stopped."""

    def __init__(self, config: LadderConfig) -> None:
        """Read settings, study and data, and grow every architecture; nothing is written."""
        from hybridnas.data import open_source, source_config
        from hybridnas.ladders.plan import make_plan
        from hybridnas.ladders.storage import stored_base

        name = config.title
        if any(c in name for c in "/\\") or name.startswith("."):
            raise StudyError(
                f"ladder name={name!r} must be a plain folder name, without slashes and not starting with a dot",
                field="ladder.name",
                got=name,
                allowed="a plain folder name",
            )
        pick_device(config.device)
        base = stored_base(config)
        self.config, self._base = config, base
        self.plan: Plan = make_plan(config, base, open_source(source_config(base.data)))
        self.folder = self.plan.folder
        data = source_config(base.data).to_dict()
        kept = {key: value for key, value in config.to_dict().items() if key not in FREE}
        own = {
            "study": config.study and Path(config.study).name,
            "budget": base.budget.identity(),
            "data": {key: value for key, value in data.items() if key != "cache_dir" and value is not None},
            "data_fingerprint": self.plan.source.fingerprint,
            "active_params": self.plan.target,
            "final_lr_fraction": ANNEALED_LR_FRACTION,
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(plain({**kept, **own})))

    def run(self, callbacks: Iterable[Callback] = (), *, report: Callable[[str], None] | None = None) -> LadderResult:
        """Train what is missing, then fit, draw and write the results; also after Ctrl-C, which is raised then.

        Raises StudyError for a folder that is busy or holds a ladder of other settings, and what training raises.
        """
        from hybridnas.ladders.storage import shared_runs

        say = report or (lambda text: log.info("%s", text))
        began = time.time()
        self._stored_here()  # refuses before anything is written, here or in the database
        with shared_runs(self.config, self.identity, self._base, note=say) as shared, self._held(say):
            try:
                rates = self._train(shared, tuple(callbacks), say, began)
            except KeyboardInterrupt:
                say("stopping: writing what is finished; the same command goes on from here")
                self._write(self._rates(), began)
                raise
            return self._write(rates, began)

    def _rates(self) -> dict[str, float]:
        return best_rates(self.plan, tuning_runs(self.plan))

    def _train(
        self, shared: SharedRuns | None, callbacks: Sequence[Callback], say: Callable[[str], None], began: float
    ) -> dict[str, float]:
        from hybridnas.ladders.train import train

        plan, config = self.plan, self.config
        self._exchange(shared)
        until = None if config.minutes is None else began + 60 * config.minutes
        watch = _Watch(say)
        asked: set[str] = set()  # a run that fails to end is not tried again within this call
        while True:
            tuning = tuning_runs(plan)
            listed = [*tuning, *plan.runs(best_rates(plan, tuning))]
            watch.expect(listed)
            if not asked:
                self._announce(say, listed)
            missing = [run for run in tuning if not ended(run) and run.key not in asked]
            if not missing or (until is not None and time.time() >= until):
                break
            if asked:
                names = ", ".join(f"{run.entrant} {run.rate:g}" for run in missing)
                say(f"the best rate is an end of those tried, so the next one is tried, too: {names} times the law's")
            asked |= {run.key for run in missing}
            train(plan, missing, watch.run_ended, shared=shared, callbacks=callbacks, until=until)
        rates = best_rates(plan, tuning)
        if tuning and all(ended(run) for run in tuning):
            say("rates: " + ", ".join(f"{name} {rate:g} times the law's" for name, rate in rates.items()))
            if ends := at_an_end(tuning, rates):
                say(f"warning: the best rate of {', '.join(ends)} is still an end of those tried; give further rates=")
        if until is None or time.time() < until:
            listed = list(plan.runs(rates))
            train(plan, listed, watch.run_ended, shared=shared, callbacks=callbacks, until=until)
        self._exchange(shared)
        return self._rates()

    def _exchange(self, shared: SharedRuns | None) -> None:
        """Bring folder and database to the same state, until nothing new is found: rates decide further runs."""
        while shared is not None:
            tuning = tuning_runs(self.plan)
            if not shared.exchange([*tuning, *self.plan.runs(best_rates(self.plan, tuning))])[0]:
                return

    def _announce(self, say: Callable[[str], None], listed: Sequence[LadderRun]) -> None:
        from hybridnas.ladders.speed import expected_seconds

        plan, config = self.plan, self.config
        counts = [f"{len(plan.archs)} architectures", f"{len(config.sizes)} sizes", several(config.seeds, "seed")]
        missing = [run for run in listed if not ended(run)]
        tokens = sum(run.trained_tokens for run in missing)
        say(f"ladder {config.title} in {self.folder}, {describe_machine()}")
        say(f"data: {plan.source.describe()}")
        say(f"plan: {', '.join(counts)}: {len(listed)} trainings, {len(listed) - len(missing)} of them done")
        if missing:
            seconds = expected_seconds(plan, missing) / config.workers
            say(
                f"to train: {human(tokens)} tokens, about {duration(seconds)} with "
                f"{several(config.workers, 'worker')}, by a few steps of each size"
            )

    def _write(self, rates: Mapping[str, float], began: float) -> LadderResult:
        """Write CSV, figures and JSON from the folders of the runs."""
        runs = list(self.plan.runs(dict(rates)))
        rows = [row for run in runs for row in rows_of(run, self.plan.target)]
        verdict = judge(rows, self.config, self.plan.target)
        failed = tuple(f"{run.key}: {_reason(run)}" for run in runs if ended(run) not in ("", "completed"))
        figures: tuple[Path, ...] = ()
        if rows:
            from hybridnas.ladders.plots import draw

            write_rows(self.folder / "ladder.csv", rows)
            figures = draw(rows, verdict, self.plan.target, self.folder / "ladder")
        done = all(ended(run) for run in runs)
        result = LadderResult(
            self.folder, tuple(rows), verdict, dict(rates), done, failed, time.time() - began, figures
        )
        write_json(self.folder / "ladder.json", {**self._stored(), "result": found(result)})
        return result

    def _stored(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "identity": self.identity,
            "settings": masked(self.config.to_dict()),
            "anchors": self.plan.anchors,
            "machine": describe_machine(),
        }

    @contextmanager
    def _held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder alone, and refuse one of other settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"ladder folder {self.folder} cannot be made: {error.strerror or error}") from None
        shared = self.config.storage is not None  # then other commands may be in the same folder
        with locked(self.folder / ".lock", wait=False, shared=shared) as taken:
            if not taken:
                raise StudyError(
                    f"ladder {self.config.title!r} is being written by another process; wait for it, or choose "
                    f"name=NEWNAME",
                    field="ladder.name",
                    got=self.config.title,
                )
            stored = self._stored_here()
            for name, before in (stored or {}).get("anchors", {}).items():
                lr = self.plan.anchors.get(name, before)
                if lr != before:
                    say(
                        f"{name} starts at rate {lr:.4g} and no longer at {before:.4g}, as its study has found since; "
                        f"its runs are trained again"
                    )
            if stored is None:
                write_json(self.folder / "ladder.json", self._stored())
            yield

    def _stored_here(self) -> dict[str, Any] | None:
        """Return what the folder's ladder.json holds, if there is one; raises StudyError for one of other settings."""
        path = self.folder / "ladder.json"
        if (self.folder / "study.json").exists():
            raise StudyError(
                f"folder {self.folder} holds a study; choose another name=NEWNAME for the ladder",
                field="ladder.name",
                got=self.config.title,
            )
        if not path.exists():
            return None
        try:
            whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stored = whole["identity"]
        except (ValueError, KeyError, TypeError):
            raise StudyError(f"{path} is damaged; delete it to make it again from the trainings") from None
        if "final_lr_fraction" not in stored:
            raise StudyError(
                f"ladder folder {self.folder} was trained by an earlier hybridnas, whose annealed models ended at a "
                f"tenth of the rate and not at {ANNEALED_LR_FRACTION:g}, so its runs cannot be compared with new ones; "
                f"choose name=NEWNAME",
                field="ladder.final_lr_fraction",
                got=ANNEALED_LR_FRACTION,
                allowed=0.1,
            )
        differing = first_difference(stored, self.identity)
        if differing:
            raise StudyError(
                f"ladder folder {self.folder} holds another ladder: {differing}; choose name=NEWNAME, or the same "
                f"settings to go on",
                field=f"ladder.{differing.field}",
                got=differing.asked,
                allowed=differing.stored,
            )
        return whole


def found(result: LadderResult) -> dict[str, Any]:
    """Return a result as plain values for JSON; figures that do not exist are null."""
    models = [
        {
            "name": model.name,
            "rate": result.rates.get(model.name),
            "law": None
            if model.fit is None
            else {name: model.fit.coefficient(name)._asdict() for name in ("E", "A", "a", "B", "b")}
            | {"n_unit": model.fit.law.n_unit, "d_unit": model.fit.law.d_unit, "deviation": model.fit.deviation},
            "why_no_law": model.why,
            "held_out": [
                {**asdict(one), "predicted": one.predicted._asdict(), "error": one.error, "inside": one.inside}
                for one in model.held_out
            ],
            "why_untested": model.why_untested,
            "predictions": [
                {"compute": times, "params": n, "tokens": d, "loss": loss._asdict()}
                for times, n, d, loss in model.ahead
            ],
        }
        for model in result.verdict.models
    ]
    pairs = [
        {
            "lower": pair.first,
            "higher": pair.second,
            "held": pair.held,
            "gaps": [asdict(gap) for gap in pair.gaps],
            "crossing": None if pair.crossing is None else asdict(pair.crossing),
            "predictions": [{"compute": times, "gap": gap._asdict()} for times, gap in pair.ahead],
            "words": pair.sentence(),
        }
        for pair in result.verdict.pairs
    ]
    about = {"done": result.done, "failed": list(result.failed), "seconds": result.seconds, "level": LEVEL}
    about["flops"] = sum(
        max(row.flops for row in result.rows if row.folder == f) for f in {r.folder for r in result.rows}
    )
    whole: dict[str, Any] = _finite({**about, "models": models, "pairs": pairs, "notes": list(result.verdict.notes)})
    return whole


class _Watch:
    """Says of each run how it ended, how many are left, and for about how long."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.trained = 0
        self.began = time.monotonic()

    def expect(self, listed: Sequence[LadderRun]) -> None:
        """Take what the ladder consists of, as far as it is known now."""
        self.total = len(listed)
        self.left = {run.key: run.trained_tokens for run in listed if not ended(run)}

    def run_ended(self, key: str, status: str, reason: str) -> None:
        self.trained += self.left.pop(key, 0)
        seconds = (time.monotonic() - self.began) / max(1, self.trained) * sum(self.left.values())
        words = f"; about {duration(seconds)} left" if self.left else ""
        self.say(f"[{self.total - len(self.left)}/{self.total}] {key}: {status}{': ' if reason else ''}{reason}{words}")


def _reason(run: LadderRun) -> str:
    from hybridnas.train.records import read_run

    return str((read_run(run.folder) or {}).get("reason", ""))


def _finite(value: Any) -> Any:
    """Return plain values in which numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
