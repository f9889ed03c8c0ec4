"""Which student is responsible for a prompt: a function from prompts to numbers 0 ... K - 1, kept as plain files.

Song et al. 2024, "Multi-student Diffusion Distillation for Better One-step Generators", arXiv 2410.23274: the parts of
the conditions are disjoint, cover everything, are of one size, and hold what belongs together.

Letters: N prompts or classes, D features, K students.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.labels import class_label
from stepdistill.run_folder import PARTITION


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily

Array = NDArray[np.float64]

INDEX, TENSORS = f"{PARTITION}json", f"{PARTITION}safetensors"
FORMAT = 1
CHUNK = 64  # prompts that are encoded at a time
# Squared distance between unit vectors. A prompt that lies so close to a border is encoded once more, alone: the last
# bits of an encoding depend on the batch that it is made in, and the answer must not.
CLOSE = 1e-4
SAME = 1e-3  # difference between two fits of one partition on two machines


class Embedder:
    """What a stock pipeline says about a prompt: the class that it is, or its text embedding.

    Args:
        pipeline: a text-to-image pipeline of a supported family, or a `DiTPipeline`.
        folder: a Diffusers folder to take the text encoders from, in float32, where the pipeline's own may have
            another precision and so would move prompts over borders; None: the pipeline's own.
    """

    def __init__(self, pipeline: Any, folder: str | Path | None = None) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        self.pipeline = pipeline
        self._encoders: list[tuple[Any, nn.Module]] = []
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(part, CLIPTextModel | CLIPTextModelWithProjection):
                if folder is not None and part.dtype != torch.float32:
                    part = type(part).from_pretrained(folder, subfolder=name, dtype=torch.float32).eval()
                self._encoders.append((pipeline.components[name.replace("text_encoder", "tokenizer")], part))
        self._family = None if self._encoders else _reading_family(pipeline, folder)

    @property
    def has_classes(self) -> bool:
        """Whether the pipeline draws classes, and not what a text says."""
        return type(self.pipeline).__name__ == "DiTPipeline"

    @property
    def classes(self) -> int:
        """How many.

        Raises:
            UserError: the pipeline takes texts.
        """
        if not self.has_classes:
            raise UserError(f"{type(self.pipeline).__name__} has no classes that students could share; divide its "
                            "prompts with multi_student.by: clusters")  # fmt: skip
        return int(self.pipeline.transformer.config.num_embeds_ada_norm)

    def label(self, prompt: str) -> int:
        """The class that a prompt means.

        Raises:
            UserError: there is no such class.
        """
        return class_label(self.pipeline, prompt)

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> Array:
        """What the teacher's own text encoders make of prompts, at unit length, (N, D).

        The pooled embeddings of all CLIP encoders side by side; where there are none, the mean of the tokens that the
        network is given, padding left out.

        Raises:
            UserError: the pipeline takes no texts, or belongs to no family.
        """
        found = self._pooled(prompts) if self._encoders else self._mean_tokens(prompts)
        return np.asarray(nn.functional.normalize(found).numpy())

    def _pooled(self, prompts: Sequence[str]) -> Tensor:
        parts = []
        for tokenizer, encoder in self._encoders:
            tokens = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length,
                               truncation=True, return_tensors="pt").input_ids  # fmt: skip
            output = encoder(tokens.to(self.pipeline.device))
            # With a projection, the embedding that was trained against images; else the last token's hidden state.
            pooled = output["text_embeds"] if "text_embeds" in output else output["pooler_output"]
            parts.append(pooled.double().cpu())
        return torch.cat(parts, dim=1)

    def _mean_tokens(self, prompts: Sequence[str]) -> Tensor:
        if self._family is None:
            raise UserError(f"{type(self.pipeline).__name__} has no text encoder that is known here, so there are no "
                            "embeddings to find clusters in; divide with by: package.module:function")  # fmt: skip
        condition = self._family.encode_prompts(prompts).tensors
        tokens = condition["prompt_embeds"].float()
        mask = condition.get("prompt_attention_mask", torch.ones(tokens.shape[:2])).to(tokens)
        sums = torch.einsum("nlc,nl->nc", tokens, mask)
        return (sums.double() / mask.double().sum(1, keepdim=True)).cpu()


def _reading_family(pipeline: Any, folder: str | Path | None) -> ModelFamily | None:
    """The family that encodes prompts as the pipeline's network gets them; None if it gets no prompts."""
    from stepdistill.families import FAMILIES, family_class

    name, encoder = type(pipeline).__name__, pipeline.components.get("text_encoder")
    if encoder is None or name not in FAMILIES:
        return None
    reading = copy.copy(pipeline)  # which shares all parts with it, but for the encoder
    if folder is not None and encoder.dtype != torch.float32:
        exact = type(encoder).from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
        reading.register_modules(text_encoder=exact.to(encoder.device).eval())
    return family_class(name)(reading, str(folder))


class Partition(Protocol):
    """A rule that gives every prompt exactly one student."""

    @property
    def students(self) -> int:
        """How many there are, K."""

    def parts(self, prompts: Sequence[str], embedder: Embedder) -> list[int]:
        """The student of each prompt, 0 ... K - 1; prompts that nobody has seen before have one as well."""


@dataclass(frozen=True)
class ByClass:
    """Divides the classes of a class-conditional teacher.

    Attributes:
        students: K.
        table: the student of every class, (N,).
    """

    students: int
    table: tuple[int, ...]

    def parts(self, prompts: Sequence[str], embedder: Embedder) -> list[int]:
        return [self.table[embedder.label(prompt)] for prompt in prompts]

    @classmethod
    def consecutive(cls, classes: int, students: int) -> ByClass:
        """K runs of neighbouring classes, whose lengths differ by one at most."""
        _enough(classes, students, "classes")
        return cls(students, tuple(label * students // classes for label in range(classes)))


@dataclass(frozen=True)
class ByCluster:
    """Divides prompts by their embeddings f: the student is argmin_k |f - centre_k|^2 + price_k.

    Attributes:
        centres: (K, D).
        prices: (K,); they make the parts equally large, and with all of them 0 it is plain k-means.
    """

    centres: Array
    prices: Array

    @property
    def students(self) -> int:
        """K."""
        return len(self.centres)

    def parts(self, prompts: Sequence[str], embedder: Embedder) -> list[int]:
        if self.students == 1:
            return [0] * len(prompts)
        costs = self.costs(embedder.features(prompts))
        best, second = np.partition(costs, 1, axis=1)[:, :2].T
        for row in np.flatnonzero(second - best < CLOSE):
            costs[row] = self.costs(embedder.features([prompts[int(row)]]))[0]
        return [int(number) for number in costs.argmin(axis=1)]

    def costs(self, features: Array) -> Array:
        """(N, D) => squared distances plus prices, (N, K)."""
        return squared_distances(features, self.centres) + self.prices


@dataclass(frozen=True)
class ByRule:
    """Divides prompts by a function of one's own.

    Attributes:
        students: K.
        rule: "package.module:function"; the function takes a prompt and returns a student's number.
        function: what was found there.
    """

    students: int
    rule: str
    function: Callable[[str], int] = field(compare=False)

    def parts(self, prompts: Sequence[str], embedder: Embedder) -> list[int]:
        return [self._part(prompt) for prompt in prompts]

    def _part(self, prompt: str) -> int:
        try:
            number: Any = self.function(prompt)
        except Exception as error:  # whatever code of one's own may say
            raise UserError(f"{self.rule} fails at prompt {prompt!r} ({error!r}); it has to know every prompt that "
                            "may come") from error  # fmt: skip
        if isinstance(number, np.integer):
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < self.students:
            raise UserError(f"{self.rule} gives prompt {prompt!r} to student {number!r}; it has to return a number "
                            f"from 0 to {self.students - 1}")  # fmt: skip
        return number

    @classmethod
    def named(cls, rule: str, students: int) -> ByRule:
        """The rule at a Python path.

        Raises:
            UserError: there is no such function.
        """
        module, _, name = rule.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"rule {rule!r} could not be imported: {error}; give package.module:function, and "
                            "PYTHONPATH=. before the command where its file lies in this folder"
                            ) from error  # fmt: skip
        if not callable(function):
            raise UserError(f"rule {rule!r} is no function; it takes a prompt and returns a student's number")
        return cls(students, rule, function)


class Router:
    """A partition with its pipeline, which remembers what it was asked.

    Args:
        partition: the rule.
        embedder: what the rule looks at.
        known: the students of prompts that were asked for before, of this partition and teacher; is added to.
    """

    def __init__(self, partition: Partition, embedder: Embedder, known: dict[str, int] | None = None) -> None:
        self.partition, self._embedder = partition, embedder
        self._known = {} if known is None else known

    def __call__(self, prompts: Sequence[str]) -> list[int]:
        """The student of each prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            self._known.update(zip(chunk, self.partition.parts(chunk, self._embedder), strict=True))
        return [self._known[prompt] for prompt in prompts]


def squared_distances(features: Array, centres: Array) -> Array:
    """(N, D), (K, D) => (N, K); from differences, since unit vectors lie close together."""
    return np.stack([np.square(features - centre).sum(axis=1) for centre in centres], axis=1)


def save_partition(partition: Partition, folder: Path) -> None:
    """Writes partition.json and, for clusters, partition.safetensors; the first of them last."""
    content: dict[str, Any] = {"format": FORMAT, "students": partition.students}
    if isinstance(partition, ByCluster):
        content["kind"] = "clusters"
        save_file({"centres": partition.centres, "prices": partition.prices}, folder / TENSORS)
    elif isinstance(partition, ByClass):
        content |= {"kind": "classes", "table": list(partition.table)}
    elif isinstance(partition, ByRule):
        content |= {"kind": "rule", "rule": partition.rule}
    else:
        raise TypeError(f"no file format for a {type(partition).__name__}")
    (folder / INDEX).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_partition(folder: Path, rule: str | None = None) -> Partition:
    """Reads what `save_partition` wrote.

    Args:
        folder: where the files are.
        rule: the function of one's own that the files may name. It has to be given again, because reading somebody's
            folder must not run code that only the folder names.

    Raises:
        UserError: the files are damaged, or name a rule that was not given.
    """
    file = folder / INDEX
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind, students = content["kind"], int(content["students"])
        if kind == "rule":
            if rule is None or content["rule"] != rule:
                raise UserError(f"{folder}: its prompts are divided by {content['rule']!r}, Python code of its maker; "
                                f"if you have that code and trust it, name it: stepdistill sample --rule "
                                f"{content['rule']}, rule={content['rule']} behind a model of stepdistill bench and "
                                "in Python")  # fmt: skip
            return ByRule.named(rule, students)
        if kind == "classes":
            return ByClass(students, tuple(int(number) for number in content["table"]))
        tensors = load_file(folder / TENSORS)
        return ByCluster(tensors["centres"], tensors["prices"])
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); take it from another student of the same run") from error


def same_partition(a: Partition, b: Partition) -> bool:
    """Whether two partitions are one, but for the last digits of what two machines have computed."""
    if isinstance(a, ByCluster) and isinstance(b, ByCluster):
        pairs = ((a.centres, b.centres), (a.prices, b.prices))
        return all(x.shape == y.shape and np.allclose(x, y, rtol=0, atol=SAME) for x, y in pairs)
    return a == b


def _enough(found: int, students: int, what: str) -> None:
    if found < students:
        raise UserError(f"{students} students cannot share {found} different {what}; give fewer students")
