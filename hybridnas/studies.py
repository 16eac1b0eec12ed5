"""The Python API of a search: make a study, run it, read what it found.

    study = hybridnas.create_study(space="mamba_moe", budget="laptop", data="stdlib")
    study.run()
    study.best.arch, study.best.scores, study.best.model()

Nothing is printed; progress is logged under ``hybridnas.search`` and handed to callbacks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError, StudyError, suggest
from hybridnas.study.callbacks import StudyCallback
from hybridnas.study.folder import FORMAT, REPORT, completed, read_study
from hybridnas.study.records import (
    ARCH,
    COMPLETE,
    DUPLICATE,
    PRUNED,
    SEED_RESULTS,
    TEST_FIGURES,
    StudyMeta,
    TrialRecord,
    load_records,
    reference_of,
    trial_folder,
)

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM
    from hybridnas.config import FrozenConfig
    from hybridnas.data.tokenizers import Tokenizer
    from hybridnas.export.hf.writing import NativeExport
    from hybridnas.ladders.ladder import LadderResult
    from hybridnas.search.config import SearchConfig
    from hybridnas.search.runner import SearchSummary
    from hybridnas.train.callbacks import Callback

log = logging.getLogger("hybridnas.search")


def create_study(
    space: str | Mapping[str, Any] = "mamba_moe",
    budget: str | Mapping[str, Any] | FrozenConfig = "laptop",
    data: str | Mapping[str, Any] | FrozenConfig = "stdlib",
    name: str | None = None,
    **settings: Any,
) -> Study:
    """Make a study, or take up the one that lies in ``runs/NAME`` with the same settings.

    ``space``, ``budget`` and ``data``: a name, settings as a mapping, or a config. ``name``: of the study and its
    folder, by default SPACE-BUDGET-HASH. ``settings``: fields of :class:`hybridnas.search.config.SearchConfig`
    (``seed=``, ``sampler=``, ``pruner=``, ``workers=``, ``runs=`` ...), of its budget (``n_trials=``, ``minutes=``,
    ``d_model=`` ...), and the space's ``baselines=`` and ``reference=``. Nothing is trained and no folder is made
    before :meth:`Study.run`.

    Raises ConfigError that lists what is allowed.
    """
    from hybridnas.search.config import Budget, SearchConfig
    from hybridnas.search.named import named_budget, named_data, named_space
    from hybridnas.search_spaces.space import Space

    own, sizes = set(SearchConfig.field_names()) - {"space", "data", "budget", "study"}, set(Budget.field_names())
    compared = {"baselines", "reference"}
    for key in settings:
        if key not in own | sizes | compared:
            raise ConfigError(
                f"create_study has no setting {key!r}{suggest(key, own | sizes | compared)}",
                field=key,
                got=settings[key],
                allowed=tuple(sorted(own | sizes | compared)),
            )
    size = Budget.from_dict({**named_budget(budget), **{k: v for k, v in settings.items() if k in sizes}})
    config = SearchConfig.from_dict(
        {
            **{key: value for key, value in settings.items() if key in own},
            "space": {**named_space(space), **{k: v for k, v in settings.items() if k in compared}},
            "budget": size,
            "data": named_data(data),
            "study": name,
        }
    )
    Space.from_mapping(config.space)  # a wrong space is refused here, and not when it is run
    return Study.of(config)


def load_study(path: str | Path) -> Study:
    """Open a study that lies on disk, given its folder, e.g. ``runs/mamba_moe-laptop``; loads no training library.

    The beginning of a folder's name will do where no other study's name begins so.

    :meth:`Study.run` goes on with it; a study of hybridnas 0.1 can be read alone. Raises StudyError where there is
    none, or one that is damaged.
    """
    folder = completed(Path(path).expanduser())
    read_study(folder)
    return Study(folder)


class Study:
    """A study: its trials so far, and the means to go on with it.

    Everything is read from the records when it is asked for, so a study can be watched while another process runs it.
    """

    def __init__(self, path: Path, config: SearchConfig | None = None) -> None:
        """Use :func:`create_study` or :func:`load_study`."""
        self.path = path
        self._config = config

    @classmethod
    def of(cls, config: SearchConfig) -> Study:
        """Return the study that a search's settings describe; raises ConfigError or StudyError for bad ones."""
        from hybridnas.study.folder import StudyFolder

        config = config.replace(study=config.name)
        return cls(StudyFolder(Path(config.runs).expanduser(), config.name).path, config)

    @property
    def name(self) -> str:
        """The study's name, which is that of its folder."""
        return self.path.name

    @property
    def config(self) -> SearchConfig:
        """The settings of the search, as they were given or are stored."""
        if self._config is None:
            self._config = stored_config(self.path)
        return self._config

    def run(self, callbacks: Sequence[StudyCallback] = (), *, training: Sequence[Callback] = ()) -> SearchSummary:
        """Search until the budget is used; called again, also after an interruption, it goes on where it stopped.

        ``callbacks`` get the search's events besides the study's own ones, which write leaderboard, report, journal
        and MLflow; ``training`` are trainer callbacks for every training of this process. KeyboardInterrupt ends a
        search cleanly: the summary has ``ended="interrupted"``.

        Raises StudyError for a folder that is busy, damaged, of another study or of version 0.1.
        """
        from hybridnas.plugins import require
        from hybridnas.report.callbacks import ReportFiles
        from hybridnas.search.runner import Search
        from hybridnas.search.sound import SoundFiles
        from hybridnas.tracking.study import StudyTracking
        from hybridnas.train.callbacks import Callback, checked_callbacks

        if self._config is None:
            require(read_study(self.path)["identity"])
        own = [*checked_callbacks(callbacks, StudyCallback), SoundFiles(), ReportFiles(), StudyTracking()]
        training = checked_callbacks(training, Callback, "training")
        return Search(self.config, own, training=training, reference_callbacks=[ReportFiles()]).run()

    @property
    def records(self) -> list[TrialRecord]:
        """The records of all trials that have something to show, by number."""
        return load_records(self.path)[0]

    @property
    def trials(self) -> list[Trial]:
        """All trials that have something to show, by number: trained, paused, failed, rejected, duplicates."""
        return [Trial(self, record) for record in self.records]

    @property
    def best(self) -> Trial:
        """The best trial: lowest first objective of those trained to the end, or confirmed mean where there is one.

        Raises StudyError where none is.
        """
        from hybridnas.analysis.ranking import winner

        records = self.records
        found = winner(records)
        if found is None:
            raise StudyError(
                f"study {self.name!r} has no trial that was trained to the end yet "
                f"({len(records)} recorded); run it further",
                field="best",
                got=len(records),
            )
        return Trial(self, found)

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame, one row for each trial: state, architecture, choices, costs and scores.

        Raises ConfigError where pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ConfigError("to_dataframe needs pandas: pip install pandas", field="pandas") from None
        return pandas.DataFrame([trial.row() for trial in self.trials])

    def report(self) -> Path:
        """Write ``report.html`` and ``leaderboard.csv`` from the records as they are now; returns the report's path."""
        from hybridnas.report.leaderboard import write_leaderboard
        from hybridnas.report.report import write_report

        stored = read_study(self.path)
        if stored["format"] != FORMAT and (self.path / REPORT).is_file():
            return self.path / REPORT  # of version 0.1: as it was left
        meta = stored_meta(self.path)
        write_leaderboard(self.path, self.records, meta.reference)
        return write_report(self.path, self.records, meta)

    def export(self, folder: str | Path) -> Path:
        """Write the best trial's model as a folder that :func:`hybridnas.load` reads; returns the folder."""
        return self.best.export(folder)

    def ladder(self, **settings: Any) -> LadderResult:
        """Train the best and the baselines at growing size; see :func:`hybridnas.ladder` for the settings."""
        from hybridnas.ladders.ladder import ladder

        return ladder(str(self.path), **{"runs": self.path.parent, **settings})

    def tokenizer(self) -> Tokenizer | None:
        """Return the study's tokenizer, from ``best/``, which needs no corpus, else from the data; None without text.

        Raises DataError for data that is no longer there.
        """
        from hybridnas.data import open_source, source_config
        from hybridnas.export.layout import CONFIG, TOKENIZER_FILES
        from hybridnas.export.load import load_tokenizer

        exported = self.path / "best"
        if (exported / CONFIG).is_file() and (exported / TOKENIZER_FILES[0]).is_file():
            return load_tokenizer(exported)
        return open_source(source_config(self.config.data)).tokenizer

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r}, trials={len(self.records)})"


class Trial:
    """One trial of a study."""

    def __init__(self, study: Study, record: TrialRecord) -> None:
        self.study, self.record = study, record

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def state(self) -> str:
        """COMPLETE, PRUNED (stopped or paused at a rung), FAIL, DUPLICATE, INFEASIBLE."""
        return self.record.state

    @property
    def scores(self) -> dict[str, float]:
        """The objectives at the trial's end, and loss, bits per byte and accuracy where they were measured.

        ``test_loss`` and the like are of the part of the data that nothing is chosen by.
        """
        record = self.record
        measured = {"val_loss": record.valid_loss, "bits_per_byte": record.bits_per_byte, "accuracy": record.accuracy}
        measured |= {name: getattr(record, name) for name in TEST_FIGURES}
        return {**{name: value for name, value in measured.items() if value is not None}, **record.objectives}

    @property
    def cost(self) -> dict[str, float]:
        """The declared cost: params, active_params, embedding_params, flops_per_token, state_bytes."""
        return dict(self.record.cost)

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Every evaluation, with its training tokens."""
        return [dict(entry) for entry in self.record.curve]

    @property
    def arch(self) -> Arch:
        """The architecture; raises StudyError for a trial that has none."""
        from hybridnas.arch.arch import Arch

        path = self._folder() / ARCH
        if not path.is_file():
            raise StudyError(
                f"trial {self.number} of study {self.study.name!r} has no architecture: {self.state}, "
                f"{self.record.reason}",
                field="trial",
                got=self.number,
            )
        return Arch.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def model(self, device: str = "cpu") -> HybridLM:
        """Return the trained model, from the trial's checkpoint or from ``best/`` where that is this trial.

        Raises StudyError where its weights were not kept; ``python -m hybridnas.replay`` makes them again.
        """
        from hybridnas.export.load import load
        from hybridnas.train.checkpoint import load_model

        folder = self._folder()
        if any(folder.glob("checkpoint*.safetensors")):
            return load_model(folder).to(device)
        exported = self.study.path / "best"
        if (exported / "config.json").is_file():
            facts = json.loads((exported / "config.json").read_text(encoding="utf-8"))
            if facts.get("fingerprint") == self.record.fingerprint:
                return load(exported, device=device)
        if self.state not in (COMPLETE, PRUNED, DUPLICATE):
            raise StudyError(
                f"trial {self.number} of study {self.study.name!r} has no model: {self.state}, {self.record.reason}",
                field="trial",
                got=self.number,
            )
        if (read_study(self.study.path)["identity"].get("space") or {}).get("table"):
            raise StudyError(
                f"trial {self.number} of study {self.study.name!r} has no weights: its score was looked up in a table; "
                f"train its architecture, hybridnas.fit(study.best.arch, data=...)",
                field="trial",
                got=self.number,
            )
        asked = (f"study={self.study.name}", f"runs={self.study.path.parent}", f"trial={self.number}")
        raise StudyError(
            f"the weights of trial {self.number} of study {self.study.name!r} were not kept; "
            f"{shlex.join(['python', '-m', 'hybridnas.replay', *asked])} trains it again to the bit",
            field="trial",
            got=self.number,
        )

    def export(self, folder: str | Path) -> Path:
        """Write the trained model as a folder that :func:`hybridnas.load` reads; returns the folder."""
        from hybridnas.export.folder import export
        from hybridnas.export.trials import card_facts

        card = card_facts(self.record, self.study.name, self.study.config)
        return export(self.model(), Path(folder).expanduser(), tokenizer=self.study.tokenizer(), card=card)

    def export_native(self, folder: str | Path, *, format: str = "auto") -> NativeExport:
        """Write the trained model in the layout of a transformers class; returns the folder and what a reload gave.

        ``format``: a model type such as ``nemotron_h``, or ``auto``. Raises ConfigError that says what the class
        cannot express, ExportError where the reloaded logits differ.
        """
        from hybridnas.export.hf.writing import export_native
        from hybridnas.export.trials import card_facts

        card = card_facts(self.record, self.study.name, self.study.config)
        tokenizer = self.study.tokenizer()
        return export_native(self.model(), Path(folder).expanduser(), format=format, tokenizer=tokenizer, card=card)

    def row(self) -> dict[str, Any]:
        """Return the trial as one row of a table."""
        record = self.record
        return {
            "number": record.number,
            "state": record.state,
            "preset": record.preset,
            "pattern": record.pattern,
            "fingerprint": record.fingerprint,
            **{f"choice.{name}": value for name, value in record.choices.items()},
            **record.cost,
            **record.figures,
            **self.scores,
            "tokens": record.tokens,
            "seconds": record.seconds,
            "tokens_per_second": record.tokens_per_second,
            "seed": record.seed,
            "duplicate_of": record.duplicate_of,
            "reason": record.reason,
            **{f"{name}.seed{seed}": v for name in SEED_RESULTS for seed, v in getattr(record, name).items()},
        }

    def _folder(self) -> Path:
        same = self.record.duplicate_of
        return trial_folder(self.study.path, self.number if same is None else same)

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.state}, {self.record.name!r}, {self.scores})"


def stored_config(folder: Path) -> SearchConfig:
    """Return the settings of a study on disk; raises StudyError where there is none."""
    from hybridnas.search.config import Budget, SearchConfig

    stored = read_study(folder)
    limits = {k: v for k, v in (stored.get("limits") or {}).items() if k in Budget.field_names() and v is not None}
    identity = {key: value for key, value in stored["identity"].items() if key != "plugins"}
    budget = Budget.from_dict({**identity["budget"], **limits})
    return SearchConfig.from_dict(
        {**identity, "budget": budget, "study": str(stored["study"]), "runs": str(folder.parent)}
    )


def stored_meta(folder: Path) -> StudyMeta:
    """Return what the report shows of a study on disk besides its trials."""
    stored = read_study(folder)
    meta = stored.get("meta")
    if isinstance(meta, Mapping):
        names = {item.name for item in dataclasses.fields(StudyMeta)}
        return StudyMeta(**{**{key: value for key, value in meta.items() if key in names}, "folder": str(folder)})
    identity = stored["identity"]
    return StudyMeta(
        name=str(stored["study"]),
        space=str(identity.get("space", {}).get("name", "")),
        budget=str(identity.get("budget", {}).get("name", "")),
        reference=reference_of(stored),
        seed=identity.get("seed", 0),
        sampler=identity.get("sampler", ""),
        pruner=identity.get("pruner", ""),
        command=stored.get("command", ""),
        machine=stored.get("machine", ""),
        versions=stored.get("versions", {}),
        folder=str(folder),
    )
