# `make stack`: the servers that the end-to-end tests talk to, built from pinned sources into .stack/. Needs Go >= 1.26.5
# (an older one fetches it). The first build takes some 15 CPU minutes; after that, only what changed.

STACK := .stack/otelcol .stack/prometheus .stack/promtool .stack/loki .stack/compose-check
COLLECTOR_VERSION = $(shell sed -n 's/^  version: //p' collector-config/builder.yaml)

# A wrapper module builds what `go install` refuses: modules with `replace` lines.
wrapped = go build -C collector-config/$(1) -trimpath -ldflags="-s -w" $(3) -o $(CURDIR)/$@ $(2)

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

# remove_all_sd leaves out service discovery, and with it the cloud providers' SDKs: what is scraped has a fixed address.
.stack/prometheus .stack/promtool: .stack/%: collector-config/prometheus/go.mod collector-config/prometheus/go.sum
	@echo "stack: building $*"
	@$(call wrapped,prometheus,github.com/prometheus/prometheus/cmd/$*,-tags=remove_all_sd)

.stack/loki: collector-config/loki/go.mod collector-config/loki/go.sum
	@echo "stack: building loki"
	@$(call wrapped,loki,github.com/grafana/loki/v3/cmd/loki)

# Tempo is not built: see README.md beside this file.
.stack/compose-check: collector-config/compose/go.mod collector-config/compose/go.sum
	@echo "stack: building compose-check"
	@$(call wrapped,compose,github.com/compose-spec/compose-go/v2/cmd)
