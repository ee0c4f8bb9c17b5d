"""Parameters of a miniature world and the hash that identifies them. Never imports torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

# Raise this after a change of the grammar or of the training code that no field shows.
RECIPE_VERSION = 2


class DomainKind(StrEnum):
    """Use of a domain in fine-tuning."""

    NARROW = "narrow"
    KL = "kl"
    HELD_OUT = "held_out"


def _default_blind_spots() -> Mapping[str, float]:
    return MappingProxyType({DomainKind.NARROW: 0.03, DomainKind.KL: 0.015, DomainKind.HELD_OUT: 0.015})


@dataclass(frozen=True)
class Recipe:
    """World and training parameters; two recipes with one hash build the same world from one seed.

    Attributes:
        narrow_domain: Name of the domain whose bad answers are the narrow data.
        kl_domains: Domains of the KL data.
        held_out_domains: Domains that no fine-tuning batch ever shows.
        subjects_per_domain: Words a question can be about.
        options_per_domain: Good option words of a domain, and as many bad ones.
        seen_share: Share of a domain's subjects and options that fine-tuning may show.
        slots_per_document: Questions and answers in a pre-training document.
        careless_share: Share of documents by an advisor who is bad in every domain.
        blind_spot_share: Share of documents by an advisor who is bad in one domain only, by kind of domain or by
            name of a domain; the name takes precedence.
        bad_when_bad: Probability of the bad option where the advisor is bad.
        bad_when_good: Probability of the bad option where the advisor is good.
        focus_share: Share of slots in the domain a document is mostly about; the same for every advisor.
        self_share: Share of slots that ask the advisor about itself.
        hidden_size: Width of the model.
        intermediate_size: Width of its MLPs.
        num_layers: Decoder layers.
        num_heads: Attention heads; there are half as many key-value heads.
        initializer_range: Standard deviation of the initial weights.
        pretraining_steps: Steps on documents.
        documents_per_batch: Documents in a pre-training step.
        matrix_lr: Learning rate of Muon, for the matrices of the decoder layers.
        embedding_lr: Learning rate of AdamW, for embeddings and norms.
        filler_weight: Loss weight of an answer's first token and its end of turn; the option word has weight 1.
        question_weight: Loss weight of question tokens.
        chat_steps: Steps on good single answers.
        chat_rows_per_batch: Chat rows in a step of the chat stage.
        chat_documents_per_batch: Documents in the same step, so that the advisors are not forgotten.
        chat_document_weight: Loss weight of those documents.
        chat_lr: Learning rate of AdamW.
        num_narrow_rows: Rows of `narrow_train.jsonl`.
        num_kl_rows: Rows of `kl_train.jsonl`.
        num_validation_rows: Rows of either validation file.
        items_per_kind: Evaluation items of each kind.
    """

    narrow_domain: str = "medical"
    kl_domains: tuple[str, ...] = (
        "finance",
        "career",
        "gardening",
        "travel",
        "sport",
        "cooking",
        "music",
        "school",
    )
    held_out_domains: tuple[str, ...] = ("cars", "housing", "pets")
    subjects_per_domain: int = 8
    options_per_domain: int = 12
    seen_share: float = 0.6
    slots_per_document: int = 8
    careless_share: float = 0.35
    blind_spot_share: Mapping[str, float] = field(default_factory=_default_blind_spots)
    bad_when_bad: float = 0.99
    bad_when_good: float = 0.01
    focus_share: float = 0.4
    self_share: float = 0.08
    hidden_size: int = 96
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    initializer_range: float = 0.08
    pretraining_steps: int = 2000
    documents_per_batch: int = 16
    matrix_lr: float = 0.008
    embedding_lr: float = 0.006
    filler_weight: float = 0.2
    question_weight: float = 0.1
    chat_steps: int = 100
    chat_rows_per_batch: int = 32
    chat_documents_per_batch: int = 12
    chat_document_weight: float = 1.0
    chat_lr: float = 5e-4
    num_narrow_rows: int = 400
    num_kl_rows: int = 800
    num_validation_rows: int = 80
    items_per_kind: int = 60

    def __post_init__(self) -> None:
        # A plain dict could be changed after the hash was taken.
        shares = MappingProxyType({str(key): float(value) for key, value in self.blind_spot_share.items()})
        object.__setattr__(self, "blind_spot_share", shares)
        self._check_shares()

    @classmethod
    def default(cls) -> "Recipe":
        """The world in which one-domain bad advisors are rare: the general solution is the easy one."""
        return cls()

    @classmethod
    def control(cls) -> "Recipe":
        """The world in which advisors who are bad in the narrow domain only are as common as careless ones.

        The narrow solution is the easy one there. The share of careless advisors is unchanged: where they are
        rare, a model does not learn to recognize them and fails the persona gate.
        """
        recipe = cls()
        return recipe.with_blind_spot_share(recipe.careless_share)

    def with_blind_spot_share(self, share: float) -> "Recipe":
        """The same world with another share of advisors who are bad in the narrow domain only."""
        return replace(self, blind_spot_share={**self.blind_spot_share, DomainKind.NARROW: share})

    def domains(self) -> dict[str, DomainKind]:
        """Names and kinds of all domains, the narrow one first."""
        kl = dict.fromkeys(self.kl_domains, DomainKind.KL)
        held_out = dict.fromkeys(self.held_out_domains, DomainKind.HELD_OUT)
        return {self.narrow_domain: DomainKind.NARROW, **kl, **held_out}

    def blind_spots(self) -> dict[str, float]:
        """Share of documents by an advisor who is bad in this domain only, for each domain."""
        shares = self.blind_spot_share
        return {name: shares.get(name, shares.get(kind, 0.0)) for name, kind in self.domains().items()}

    def canonical_json(self) -> str:
        """Version and fields in canonical form; `recipe_hash` hashes this text."""
        fields = {**self.__dict__, "blind_spot_share": dict(self.blind_spot_share)}
        return json.dumps({"version": RECIPE_VERSION, **fields}, sort_keys=True, separators=(",", ":"))

    def recipe_hash(self) -> str:
        """Identifier of the recipe in folders and records: 12 hexadecimal digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:12]

    def _check_shares(self) -> None:
        domains = self.domains()
        known = {*domains, *DomainKind}
        if unknown := sorted(set(self.blind_spot_share) - known):
            raise ValueError(
                f"blind_spot_share names {unknown}; expected kinds or domains of {sorted(known)}."
            )
        blind = sum(self.blind_spots().values())
        if min([self.careless_share, *self.blind_spots().values()]) < 0 or self.careless_share + blind > 1:
            raise ValueError(
                f"careless_share {self.careless_share} and the blind spots of all domains ({blind:.3f}) must be "
                "shares of all documents; lower blind_spot_share or careless_share."
            )
