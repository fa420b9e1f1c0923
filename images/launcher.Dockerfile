# Starts training jobs and searches on a cluster, and watches them: no torch, and no kfp.
# Build it with `make images`; docs/images.md says more.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /build
COPY requirements/launcher.txt images/slim.py ./
# One layer, so that what is removed takes no space. Bytecode carries no times: the same lock gives the same files.
RUN python -m venv --without-pip /opt/venv \
    && site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --disable-pip-version-check \
        --quiet --require-hashes --no-deps -r launcher.txt \
    && python slim.py "$site" \
    && echo /opt/millrace >"$site/millrace.pth" \
    && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$site"
COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY components/__init__.py components/table.py components/
COPY components/launch components/launch
# The wheel of the code that this image needs, in a layer of its own: a change of the code moves a few hundred kilobytes.
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --disable-pip-version-check \
        --quiet --no-build-isolation --no-deps --target /opt/millrace . \
    && rm -rf /opt/millrace/bin \
    && python -m pip --python /opt/venv/bin/python uninstall --quiet --yes setuptools \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/millrace

FROM ${BASE}
ARG BASE VERSION=0 REVISION=unknown CREATED=1970-01-01T00:00:00Z SOURCE=""
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/millrace /opt/millrace
# Everything that is written goes below /tmp, so that the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    MILLRACE_IMAGE=launcher \
    USER=millrace HOME=/tmp TMPDIR=/tmp XDG_CACHE_HOME=/tmp/.cache XDG_CONFIG_HOME=/tmp/.config \
    XDG_DATA_HOME=/tmp/.local PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 \
    GOMP_SPINCOUNT=2000 \
    DO_NOT_TRACK=1 DVC_NO_ANALYTICS=1 ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1
LABEL org.opencontainers.image.title="millrace/launcher" \
    org.opencontainers.image.description="Starts and watches the jobs of a millrace pipeline on a cluster" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED" \
    org.opencontainers.image.source="$SOURCE" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="$BASE"
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["python", "-m", "components.launch"]
