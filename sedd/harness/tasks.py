"""lm-eval's interface to a ``Harness``, and the evaluation of tasks.

``language_model`` wraps a harness in lm-eval's interface and keeps a record of each request.
``evaluate_tasks`` runs tasks and adds the Monte-Carlo errors of their metrics. lm-eval is imported
when these two functions are called.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd.errors import UserError, first_line
from sedd.evaluation.continuations import ContinuationScores
from sedd.harness.answering import MAX_NEW_TOKENS, Harness, Question
from sedd.harness.metrics import metric_errors, score_errors, summary

DEFAULT_TASKS = (False, True)  # whether to look among lm-eval's own tasks too, in this order
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class _HarnessMethods:
    """The methods of lm-eval's ``TemplateLM`` that a harness implements.

    lm-eval need not be installed, so that its class becomes a base in ``language_model`` only.
    """

    _encode_pair: Callable[[str, str], tuple[list[int], list[int]]]  # of ``TemplateLM``

    def __init__(self, harness: Harness, records: list[dict[str, Any]]):
        super().__init__()
        self.harness = harness
        self.records = records

    @property
    def eot_token_id(self):
        return self.harness.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        return self.harness.limit

    @property
    def tokenizer_name(self) -> str:
        tokenizer = self.harness.tokenizer
        return f"{tokenizer.name}-{tokenizer.fingerprint()}".replace("/", "_")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.harness.tokenizer.turns.template or ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.harness.conversation(chat_history, answer=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        return self.harness.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        texts = [request.args for request in requests]
        pairs = [
            self._encode_pair(context, continuation)
            if context
            else (self.harness.start, self.harness.encode(continuation))
            for context, continuation in texts
        ]
        scores = self.harness.score(pairs)
        self._record_scores(requests, scores)
        return _as_results(scores)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False):
        return _as_results(self.harness.score([(context, ids) for _, context, ids in requests]))

    def _record_scores(self, requests, scores: ContinuationScores) -> None:
        rows = (scores.nats_S, scores.error_S, scores.exact_S, scores.greedy_S)
        for request, nats, error, exact, greedy in zip(requests, *rows, strict=True):
            self._record(
                request,
                nats=float(nats),
                nats_error=float(error),
                exact=bool(exact),
                greedy=bool(greedy),
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        windows = [self.harness.windows(request.args[0]) for request in requests]
        scores = self.harness.score([pair for one in windows for pair in one])
        ends = np.cumsum([len(one) for one in windows])
        results = []
        for request, one, end in zip(requests, windows, ends, strict=True):
            part = slice(end - len(one), end)
            nats = float(scores.nats_S[part].sum())
            error = float(np.sqrt((scores.error_S[part] ** 2).sum()))
            exact = bool(scores.exact_S[part].all())
            self._record(request, nats=nats, nats_error=error, exact=exact)
            results.append(-nats)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False):
        from lm_eval.models.utils import normalize_gen_kwargs

        questions = []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, MAX_NEW_TOKENS)
            questions.append(_question(context, options))
        answers = self.harness.answer(questions)
        for request, one in zip(requests, answers, strict=True):
            self._record(request, calls=one.calls, tokens=one.tokens, text=one.text)
        return [one.text for one in answers]

    def get_model_info(self) -> dict[str, Any]:
        return self.harness.describe()

    def _record(self, request, **figures) -> None:
        self.records.append(
            {"task": request.task_name, "doc_id": request.doc_id, "idx": request.idx, **figures}
        )


def language_model(harness: Harness, records: list[dict[str, Any]]) -> Any:
    """Wrap a harness in lm-eval's interface, a ``TemplateLM``.

    Args:
        harness: answers the requests.
        records: gets an entry for each request: the task, the number of the document and of the
            request, and the score with its error, or the answer with its tokens and calls.

    Raises:
        UserError: if lm-eval is not installed.
    """
    base = _lm_eval().api.model.TemplateLM

    class LanguageModel(_HarnessMethods, base):
        """lm-eval's view of a harness."""

    return LanguageModel(harness, records)


def _as_results(scores: ContinuationScores) -> list[tuple[float, bool]]:
    """The scores as lm-eval takes them: log likelihoods, and whether greedy decoding agrees."""
    return list(zip((-scores.nats_S).tolist(), scores.greedy_S.tolist(), strict=True))


def _question(context: str, options: Mapping[str, Any]) -> Question:
    """The question of a request with generation options that lm-eval has normalised."""
    unknown = sorted(options.keys() - GENERATION)
    if unknown:
        raise UserError(
            f"a task asks for the generation option {unknown[0]!r}, which is not supported; there "
            f"are {', '.join(sorted(GENERATION))}"
        )
    return Question(
        context=context,
        until=tuple(options["until"]),
        max_new_tokens=options["max_gen_toks"],
        temperature=float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0)),
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
    )


def evaluate_tasks(
    harness: Harness,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        harness: the model, and how it answers. With ``harness.chat`` every request is written by
            the chat template, examples as earlier turns.
        tasks: names of tasks, groups or tags, or YAML files.
        include_path: a folder with further tasks.
        num_fewshot: examples before each question; by default the task's number.
        limit: evaluate only so many documents of each task.
        gen_kwargs: options of generation that replace those of the tasks.
        system: a system message; without a chat template, it is put in front of the text.
        confirm_run_unsafe_code: allow tasks that run code which the model has written.

    Returns:
        lm-eval's results, and a record of each request (see ``language_model``). In the results
        each metric METRIC of a task that compares likelihoods also has its Monte-Carlo error, with
        the key ``METRIC_mc_stderr,none``. The entry ``sedd`` sums up the records of each task.

    Raises:
        UserError: if lm-eval is not installed, there is no such task, its data cannot be read, it
            runs code without a confirmation, or a request cannot be answered.
    """
    lm_eval = _lm_eval()
    records: list[dict[str, Any]] = []
    model = language_model(harness, records)
    manager, loaded = _load(tasks, include_path)
    if not confirm_run_unsafe_code:
        _check_safe(loaded["tasks"])
    manager.load = lambda _: loaded  # lm-eval would load the tasks again
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        batch_size=harness.batch_size,
        limit=limit,
        log_samples=False,  # they are in the records
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
        system_instruction=system,
        apply_chat_template=harness.chat,
        fewshot_as_multiturn=harness.chat,
    )
    error_of = score_errors(records)
    for name, task in loaded["tasks"].items():
        for metric, error in metric_errors(task, error_of, harness.seed).items():
            results["results"][name][metric] = error
    results["sedd"] = {**harness.describe(), "tasks": summary(records)}
    return results, records


def _check_safe(tasks: Mapping[str, Any]) -> None:
    """Raise UserError if one of these tasks of lm-eval runs code that the model writes."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs code that the model writes: confirm it by "
                "confirm_run_unsafe_code, in a place where that code can do no harm"
            )


def _lm_eval() -> Any:
    """The package lm-eval; raises UserError if it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"the harness needs lm-eval ({first_line(error)}): pip install -e '.[harness]'"
        ) from error
    return lm_eval


def _load(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, dict[str, Any]]:
    """The manager that finds the tasks of these names, and the tasks.

    lm-eval's own tasks are thousands of files: they are read only if a name is not found elsewhere.
    """
    task_manager = _lm_eval().tasks.TaskManager
    include_path = None if include_path is None else str(include_path)
    missing = ""
    for defaults in DEFAULT_TASKS:
        manager = task_manager(include_path=include_path, include_defaults=defaults)
        try:
            return manager, manager.load(list(tasks))
        except KeyError as error:
            missing = error.args[0]
        except (OSError, ValueError) as error:
            raise UserError(f"tasks {', '.join(tasks)}: {first_line(error)}") from error
    raise UserError(f"tasks {', '.join(tasks)}: {missing}")
