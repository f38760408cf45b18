# `make stack`: the Collector and the Prometheus that the end-to-end tests talk to, built from pinned sources into
# .stack/. Needs Go >= 1.25.8. The first build takes 11 CPU minutes; after that, only what changed.

STACK := .stack/otelcol .stack/prometheus .stack/promtool
COLLECTOR_VERSION = $(shell sed -n 's/^  version: //p' collector-config/builder.yaml)

.PHONY: stack
# Go keeps every core busy by itself; two builds at once would only compile their common packages twice.
.NOTPARALLEL: stack
stack: $(STACK)
	@echo "stack: ready in .stack/"

$(STACK): export CGO_ENABLED := 0
$(STACK): export GOFLAGS += -buildvcs=false

# The builder's version is the version of the modules it combines.
.stack/otelcol: collector-config/builder.yaml
	@echo "stack: building the OpenTelemetry Collector $(COLLECTOR_VERSION)"
	@mkdir -p .stack/otelcol-source
	@go run go.opentelemetry.io/collector/cmd/builder@v$(COLLECTOR_VERSION) \
		--config=$< --ldflags="-s -w" --skip-strict-versioning=false
	@mv .stack/otelcol-source/otelcol $@

# remove_all_sd leaves out service discovery, and with it the cloud providers' SDKs: nothing here is scraped.
.stack/prometheus .stack/promtool: .stack/%: collector-config/prometheus/go.mod collector-config/prometheus/go.sum
	@echo "stack: building $*"
	@go build -C collector-config/prometheus -trimpath -ldflags="-s -w" -tags=remove_all_sd \
		-o $(CURDIR)/$@ github.com/prometheus/prometheus/cmd/$*
