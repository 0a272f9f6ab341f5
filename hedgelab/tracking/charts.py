"""Where MLflow's UI opens: on the training runs of an experiment, and where a run has parts, on charts of how they differ."""

import json
import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from hedgelab.errors import UserError
from hedgelab.tracking.listing import compare
from hedgelab.tracking.runs import children, resolve_run
from hedgelab.tracking.store import ensure_store

_NUMBER = r"-?[\d.]+(e-?\d+)?"
_MOST_PARTS, _MOST_AXES, _MOST_CHARTS = 100, 4, 6


def page(word: str = "last") -> str:
    """The part behind the host of the address that shows the run which ``word`` means, with the parts that it has by now.

    MLflow keeps an arrangement of charts that is to be shared in a tag of the experiment, and the address names the tag.
    """
    try:
        run = resolve_run(word)
    except UserError:
        if word != "last":
            raise
        return ""  # there is none yet
    client = ensure_store()
    experiment = client.get_experiment_by_name(run.experiment)
    assert experiment is not None, "it has a run"
    query = {"workflowType": "machine_learning"}  # not MLflow's pages about agents
    if len(parts := children(run, most=_MOST_PARTS)) > 1:
        table = compare(parts)
        axes = [key for key, values in table.params.items() if "-" not in values][:_MOST_AXES]  # that all parts have
        metrics = [key for key, values in table.metrics.items() if len(set(values)) > 1][:_MOST_CHARTS]
        number = next((key for key in axes if all(re.fullmatch(_NUMBER, value) for value in table.params[key])), None)
        cards: list[dict[str, Any]] = [
            {"type": "PARALLEL", "selectedParams": axes, "selectedMetrics": metrics[:2], "showAllRuns": True}
        ]
        for key in metrics:
            across = {"xaxis": {"key": number, "type": "PARAM"}, "yaxis": {"key": key, "type": "METRIC"}}
            cards.append({"type": "BAR", "metricKey": key} if number is None else {"type": "SCATTER", **across})
        more = {"metricSectionId": "parts", "runsCountToCompare": _MOST_PARTS, "deleted": False, "isGenerated": False}
        columns = ["attributes.`Dataset`", *(f"params.`{key}`" for key in axes), *(f"metrics.`{key}`" for key in metrics)]
        state = {
            "searchFilter": f"tags.mlflow.parentRunId = '{run.run_id}'",
            "compareRunCharts": [{"uuid": f"chart{place}", **card, **more} for place, card in enumerate(cards)],
            "compareRunSections": [{"uuid": "parts", "name": run.name, "display": True, "isReordered": True}],
            "isAccordionReordered": True, "runsHiddenMode": "SHOW_ALL", "selectedColumns": columns,
            "orderByKey": f"metrics.`{metrics[0]}`" if metrics else "attributes.run_name",  # by time, parts are folded away
        }  # fmt: skip
        with suppress(Exception):  # a server may let one read only
            tag = f"mlflow.sharedViewState.{run.run_id}"
            client.set_experiment_tag(experiment.experiment_id, tag, json.dumps(state))
            query |= {"compareRunsMode": "CHART", "viewStateShareKey": run.run_id}
    return f"/#/experiments/{experiment.experiment_id}/runs?{urlencode(query)}"
