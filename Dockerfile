# A server on a CPU: OpenAI's interface on port 8000.
#
#     docker build -t specengine .
#     docker run --rm -p 127.0.0.1:8000:8000 specengine                               # the bundled pair
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" specengine \
#         --model /models/target --draft-model /models/draft
#
# PIP_FLAGS tells pip where packages come from, for instance an index with PyTorch's builds for CPUs, which are smaller:
# --build-arg PIP_FLAGS="--extra-index-url ...". EXTRAS=ray adds what many machines need (examples/serving/kuberay.yaml).
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/specengine
ENV PATH=/opt/specengine/bin:$PATH
ARG PIP_FLAGS=""
# The extension is built against the installed PyTorch: build and use must be one version.
COPY constraints.txt ./
RUN pip install --no-cache-dir $PIP_FLAGS -c constraints.txt torch numpy setuptools wheel ninja
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY specengine specengine
ARG EXTRAS=serve
RUN pip install --no-cache-dir $PIP_FLAGS -c constraints.txt --no-build-isolation ".[$EXTRAS]"

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 specengine
COPY --from=build /opt/specengine /opt/specengine
ENV PATH=/opt/specengine/bin:$PATH PYTHONUNBUFFERED=1
USER specengine
WORKDIR /home/specengine
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
# 0.0.0.0 is the container's: what may reach it is for whoever publishes the port to say.
ENTRYPOINT ["specengine", "serve", "--host", "0.0.0.0", "--port", "8000"]
