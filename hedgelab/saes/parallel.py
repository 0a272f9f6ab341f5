"""Where the sharded strategy was found before it moved to :mod:`hedgelab.training.sharding`."""

from hedgelab.training.sharding import ShardedStrategy

__all__ = ["ShardedStrategy"]
