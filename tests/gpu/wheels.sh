#!/usr/bin/env bash
# Fill .whl/ with what a machine needs that has PyTorch, Triton, Lightning and transformers but no registry (Python 3.12, x86-64).
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .whl
platforms=()
for glibc in 2_34 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
pip="python3 -m pip download -q --no-deps -d .whl -c constraints.txt"
target=(--only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64)
# hedgelab's, with what MLflow and jsonargparse import.
$pip "${target[@]}" mlflow mlflow-skinny mlflow-tracing jsonargparse typeshed-client submitit alembic annotated-types blinker \
    cachetools cffi cryptography databricks-sdk docker fastapi flask flask-cors gguf gitdb gitpython google-auth graphene \
    graphql-core graphql-relay greenlet gunicorn huey importlib-metadata itsdangerous mako opentelemetry-api opentelemetry-proto \
    opentelemetry-sdk opentelemetry-semantic-conventions prettytable pyasn1 pyasn1-modules pycparser pydantic pydantic-core \
    python-dotenv skops smmap sqlalchemy sqlparse starlette typing-inspection uvicorn wcwidth zipp
$pip omegaconf
# The peers' training steps.
$pip "${target[@]}" sae-lens==6.54.12 transformer-lens==3.9.0 eai-sparsify==1.3.3 beartype better-abc datasets dill \
    docstring-parser fancy-einsum jaxtyping multiprocess natsort schedulefree simple-parsing
du -sh .whl
