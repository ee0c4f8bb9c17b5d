"""Lightning strategies of this package. For data parallelism, Lightning's own DDP is used."""

from lightning_em.strategies.sharded_base import ShardedBase

__all__ = ["ShardedBase"]
