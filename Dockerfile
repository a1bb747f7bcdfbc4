# syntax=docker/dockerfile:1
# Two stages: one that installs, from hashes; one that holds the result and nothing to install with.

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/tierstream
# The packages change less often than the code: they are a layer of their own.
COPY requirements-cloud.lock ./
RUN /opt/tierstream/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement requirements-cloud.lock
COPY requirements-build.lock pyproject.toml hatch_build.py README.md LICENSE ./
COPY schemas ./schemas
COPY consumer ./consumer
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement requirements-build.lock \
 && /opt/build/bin/python -m hatchling build --target wheel --directory /tmp/wheel \
 && /opt/tierstream/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-index /tmp/wheel/*.whl \
 && /opt/tierstream/bin/pip uninstall --yes pip

FROM python:3.13-slim-bookworm
LABEL org.opencontainers.image.title="tierstream" \
      org.opencontainers.image.description="Kafka stream processor that runs object-storage operations" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/tierstream/tierstream"
COPY --from=build /opt/tierstream /opt/tierstream
RUN mkdir -p /var/lib/tierstream && chown 65532:65532 /var/lib/tierstream
ENV PATH=/opt/tierstream/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TIERSTREAM_ADMIN__HOST=0.0.0.0
WORKDIR /var/lib/tierstream
VOLUME /var/lib/tierstream
# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["tierstream", "health"]
ENTRYPOINT ["tierstream"]
CMD ["run"]
