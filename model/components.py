"""What we train, as components of a diffusers pipeline: each saves and loads itself by diffusers' own means.

Thin coats: the modules inside are those of training, under the same names. Letters: B batch, Q queries, D MLLM width,
C conditioning width, L label tokens, K words a token, c h w latent channels, height, width."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin  # pyright: ignore[reportPrivateImportUsage]
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from model.connector import Connector, ConnectorConfig
from model.files import parse_config
from model.labels import Labels, LabelsConfig
from model.prefilled import Looked
from model.queries import Queries
from model.sit import SiT, SiTConfig, SiTOutput


def _takes(kind: Any, *further: str) -> Callable[[Any], Any]:
    """Gives a constructor of any keywords a signature, which says what diffusers writes to config.json and reads from it:
    the `further` ones, then the fields of a dataclass."""

    def signed(init: Any) -> Any:
        defaults = {name: MISSING for name in further} | {field.name: field.default for field in fields(kind)}
        init.__signature__ = inspect.Signature(
            [
                inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                *(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=inspect.Parameter.empty if default is MISSING else default,
                    )
                    for name, default in defaults.items()
                ),
            ]
        )
        return init

    return signed


class ConnectorModel(ModelMixin, ConfigMixin):
    """The connector, and the queries that it hears the answers to."""

    @register_to_config
    @_takes(ConnectorConfig, "width", "out_width", "seen_width", "num_queries", "read")
    def __init__(self, width: int, out_width: int, seen_width: int, num_queries: int, read: str, **settings: Any):
        super().__init__()
        self.queries = Queries(num_queries, width) if read == "queries" else None
        config = parse_config(ConnectorConfig, settings, _where("connector"))
        self.connector = Connector(config, width, out_width, seen_width=seen_width)

    @classmethod
    def of(cls, queries: Queries | None, connector: Connector, count: int) -> "ConnectorModel":
        """Holds the very modules; `count` is Q."""
        width, out_width = connector.project[0].in_features, connector.norm.weight.shape[0]
        read = "prompt" if queries is None else "queries"
        seen_width = 0 if connector.ages is None else connector.ages.embedding_dim
        sizes = {"width": width, "out_width": out_width, "seen_width": seen_width}
        made = cls(**sizes, num_queries=count, read=read, **asdict(connector.config))
        made.queries, made.connector = queries, connector
        return made.eval()

    def forward(self, states: Tensor, looked: Looked | None = None) -> Tensor:
        """As `Connector.forward`."""
        return self.connector(states, looked)


class SiTModel(ModelMixin, ConfigMixin):
    """A SiT. Its `config` has the fields of a SiTConfig, so that it stands wherever a SiT does."""

    @register_to_config
    @_takes(SiTConfig)
    def __init__(self, **settings: Any):
        super().__init__()
        self.sit = SiT(parse_config(SiTConfig, settings, _where("transformer")))

    @classmethod
    def of(cls, sit: SiT) -> "SiTModel":
        """Holds the very module."""
        made = cls(**asdict(sit.config))
        made.sit = sit
        return made.eval()

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, hidden_at: int | None = None) -> SiTOutput:
        """As `SiT.forward`."""
        return self.sit(x_t, t, condition, hidden_at=hidden_at)


class LabelsModel(ModelMixin, ConfigMixin):
    """The embedding of labels."""

    @register_to_config
    @_takes(LabelsConfig)
    def __init__(self, **settings: Any):
        super().__init__()
        self.labels = Labels(parse_config(LabelsConfig, settings, _where("labels")))

    @classmethod
    def of(cls, labels: Labels) -> "LabelsModel":
        """Holds the very module."""
        made = cls(**asdict(labels.config))
        made.labels = labels
        return made.eval()

    def forward(self, words: Tensor, places: Tensor | None = None) -> Tensor:
        """Words [B, L, K], places [B, L, 3] -> [B, L, C]."""
        return self.labels(words, places)


def _where(component: str) -> Path:
    return Path(component) / "config.json"
