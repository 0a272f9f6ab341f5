"""Checkpoints of earlier releases, brought to what this one reads."""

from typing import Any

OLD, NEW = "log_threshold", "theta"


def upgraded(checkpoint: dict[str, Any], rate_factor: float = 10.0) -> dict[str, Any]:
    """A checkpoint in which JumpReLU SAEs have thresholds θ; releases up to 0.2 trained and kept their logarithms.

    θ gets the group of its own that its learning rate, ``rate_factor`` times the others', needs. Its optimiser state, which
    is of gradients to the logarithm, is left out, so that it starts anew.
    """
    state = checkpoint["state_dict"]
    old = [name for name in state if name.rpartition(".")[2] == OLD]
    if not old:
        return checkpoint
    for name in old:
        state[name.removesuffix(OLD) + NEW] = state.pop(name).exp()
    members = {name.split(".")[1] for name in old if name.startswith("members.")}
    for optimizer in checkpoint.get("optimizer_states", []):
        parts = [optimizer]
        schedules = checkpoint.get("lr_schedulers", [])
        if "optimizers" in optimizer:  # of a group of SAEs
            parts = [part for name, part in optimizer["optimizers"].items() if name in members]
            schedules = [part for name, part in optimizer["schedules"].items() if name in members]
        for part in parts:
            (group,) = part["param_groups"]
            *others, theta = group["params"]  # the last parameter of its SAE
            rates = {key: rate_factor * group[key] for key in ("lr", "initial_lr") if key in group}
            part["param_groups"] = [{**group, "params": others}, {**group, **rates, "params": [theta]}]
            part["state"].pop(theta, None)
        for schedule in schedules:
            for key in ("base_lrs", "_last_lr"):
                schedule[key] = [*schedule[key], rate_factor * schedule[key][-1]]
            if "lr_lambdas" in schedule:
                schedule["lr_lambdas"] = 2 * schedule["lr_lambdas"]
    return checkpoint
