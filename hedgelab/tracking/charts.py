"""Where MLflow's UI opens: on the training runs of an experiment, and where a run has parts, on charts of how they differ."""

import json
from contextlib import suppress
from urllib.parse import urlencode

from hedgelab.errors import UserError
from hedgelab.tracking.listing import compare
from hedgelab.tracking.runs import children, resolve_run
from hedgelab.tracking.store import ensure_store

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
        cards = [{"type": "PARALLEL", "selectedParams": axes, "selectedMetrics": metrics[:2], "showAllRuns": True}]
        if numbers := [key for key in axes if all(_is_number(value) for value in table.params[key])]:
            x = {"key": numbers[0], "type": "PARAM"}
            cards += [{"type": "SCATTER", "xaxis": x, "yaxis": {"key": key, "type": "METRIC"}} for key in metrics]
        else:
            cards += [{"type": "BAR", "metricKey": key} for key in metrics]
        more = {"metricSectionId": "parts", "runsCountToCompare": _MOST_PARTS, "deleted": False, "isGenerated": False}
        columns = {"attributes": ["Dataset", "Models"], "params": axes, "metrics": metrics}
        state = {
            "searchFilter": f"tags.mlflow.parentRunId = '{run.run_id}'",
            "compareRunCharts": [{"uuid": f"chart{number}", **card, **more} for number, card in enumerate(cards)],
            "compareRunSections": [{"uuid": "parts", "name": run.name, "display": True, "isReordered": True}],
            "isAccordionReordered": True,
            "runsHiddenMode": "SHOW_ALL",
            "orderByKey": f"metrics.`{metrics[0]}`"
            if metrics
            else "attributes.`Run Name`",  # by time, parts are folded away
            "selectedColumns": [f"{kind}.`{key}`" for kind, keys in columns.items() for key in keys],
        }
        with suppress(Exception):  # a server may let one read only
            client.set_experiment_tag(
                experiment.experiment_id, f"mlflow.sharedViewState.{run.run_id}", json.dumps(state)
            )
            query |= {"compareRunsMode": "CHART", "viewStateShareKey": run.run_id}
    return f"/#/experiments/{experiment.experiment_id}/runs?{urlencode(query)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
