"""Lightning strategies of our own; what Lightning's DDP does, it does well enough."""

from lightning_em.strategies.sharded_base import ShardedBase

__all__ = ["ShardedBase"]
