"""A mixture in EleutherAI's lm-evaluation-harness, for `train_q0.py evaluate --tasks`."""
from dataclasses import replace

import lm_eval
import lm_eval.tasks
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import train_q0 as q


def evaluate_tasks(mixtures, tasks, folder, limit):
    """Print the harness's scores of every mixture {name: Mixture}. Raises UserError where a task is
    not there."""
    with q.reading(f"a task of {', '.join(tasks)}"):
        manager = lm_eval.tasks.TaskManager(include_path=folder)  # once: it reads 14,000 files
        manager.load(tasks)  # a wrong name or file ends here; what fails below is a bug
    for name, mixture in mixtures.items():
        model = HarnessModel(replace(mixture))  # a copy, which lets go of its members
        found = lm_eval.simple_evaluate(
            model, tasks=tasks, limit=limit, log_samples=False, task_manager=manager)
        for task, scores in found["results"].items():
            print_scores(f"task:{task}", scores, name)


def print_scores(task, scores, name):
    for key, score in scores.items():
        if "," not in key or "_stderr" in key:
            continue
        metric, kind = key.split(",")
        error = scores[f"{metric}_stderr,{kind}"]
        if not isinstance(error, str):  # "N/A" where the harness has none
            error = f"{error:.4f}"
        print(f"{task} {metric}:{score:.4f} stderr:{error} {name}")


class HarnessModel(TemplateLM):
    """A mixture as the harness asks for it. What is longer than a sequence loses its front."""
    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.seq_len = mixture.models[0].cfg.seq_len
        self.batch = mixture.models[0].cfg.micro_batch
        self.eot, = mixture.encode("")

    @property
    def eot_token_id(self):
        return self.eot

    def tok_encode(self, string, add_special_tokens=None, **_):
        tokens = self.mixture.encode(string)
        return tokens[1:] if add_special_tokens is False else tokens  # a context begins a document

    def _loglikelihood_tokens(self, requests, **_):
        """[(log p of the continuation, whether it is the likeliest), ...] of requests
        [(any, context, continuation), ...]."""
        longest = self.seq_len + 1
        rows = [(context + continuation)[-longest:] for _, context, continuation in requests]
        by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = {}
        for begin in range(0, len(rows), self.batch):
            part = by_length[begin:begin + self.batch]
            scores, hits = self.score([rows[i] for i in part])
            for i, score, hit in zip(part, scores, hits):
                end = len(rows[i]) - 1
                where = slice(max(0, end - len(requests[i][2])), end)
                found[i] = float(score[where].sum()), bool(hit[where].all())
        return [found[i] for i in range(len(rows))]

    def score(self, rows):
        """log p and whether it is the largest, [B, T] each, of the tokens after the first of rows,
        the longest first."""
        longest = len(rows[0])
        padded = [row + [0] * (longest - len(row)) for row in rows]  # nothing sees what comes later
        tokens = torch.tensor(padded, device=self.mixture.device)
        targets = tokens[:, 1:]
        log_p = self.mixture.log_probs(tokens[:, :-1])
        scores = log_p.gather(2, targets[..., None])[..., 0].double()
        return scores, log_p.argmax(-1) == targets

    def loglikelihood_rolling(self, requests, **_):
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.eot, self.seq_len, 1)
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests, **_):
        # a request that is repeated draws another text each time
        return [self.text_until(*request.args, seed=i) for i, request in enumerate(requests)]

    def text_until(self, prompt, options, seed):
        """Text after `prompt`, cut before the first stop string."""
        options = normalize_gen_kwargs(options)
        stops = [stop for stop in options["until"] if stop]
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        top_p = options.get("top_p", 1.0)
        text = ""
        for piece in self.mixture.generate(
                prompt, options["max_gen_toks"], temperature, top_p, seed):
            text += piece
            found = [text.index(stop) for stop in stops if stop in text]
            if found:
                return text[:min(found)]
        return text
