SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
IMAGE ?= db-controller:$(VERSION)

# Arguments of the demo, of the benches, and of go test. Empty: the whole thing.
DEMO_ARGS ?=
BENCH ?=
TEST_ARGS ?=

##@ Use

.PHONY: help
help: ## Show this text.
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo DEMO_ARGS='--latency 80ms --cut ap --for 10s'    make test TEST_ARGS=./store/..."

.PHONY: demo
demo: build ## Three regions on this machine, fed with apt's package index. DEMO_ARGS replaces the arguments.
	@hack/deps.sh demo
ifeq ($(strip $(DEMO_ARGS)),)
	@input=$$(mktemp); trap 'rm -f "$$input"' EXIT; \
	go run ./hack/debian-packages > "$$input"; \
	bin/db-controller demo --load "$$input" --exit-when-synced
else
	@bin/db-controller demo $(DEMO_ARGS)
endif

.PHONY: build
build: ## Build the static binary bin/db-controller.
	@CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/ ./cmd/db-controller

.PHONY: image
image: ## Build the container image. IMAGE names it.
	@docker version --format '{{.Server.Version}}' >/dev/null 2>&1 || \
		{ echo "make image: no docker daemon answers; start one, or set DOCKER_HOST" >&2; exit 1; }
	docker build --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --tag $(IMAGE) .

.PHONY: chart
chart: ## Lint the Helm charts with all their examples, and package them into bin/charts.
	@mkdir -p bin/charts
	@hack/chart.sh package bin/charts

.PHONY: e2e-kind
e2e-kind: ## Try it in Kubernetes: two regions in a kind cluster. Needs docker, kind, kubectl, helm.
	@hack/e2e-kind.sh

##@ Develop

.PHONY: deps
deps: ## Install what demo and tests need: PostgreSQL, Redis, Prometheus (Debian packages, test builds).
	@hack/deps.sh demo
	@hack/deps.sh test

.PHONY: kube-assets
kube-assets: ## Build etcd and kube-apiserver for the tests (once; minutes).
	@hack/kube-assets.sh

.PHONY: test
test: ## Run all tests, those of the product under the race detector. TEST_ARGS picks packages or tests.
	@hack/kube-assets.sh >/dev/null & hack/deps.sh test && wait && hack/test.sh $(TEST_ARGS) # one computes while the other downloads

.PHONY: model
model: ## Search the protocol of references exhaustively, and find every planted bug.
	@go run ./hack/model

.PHONY: lint
lint: verify-generate ## Check style, dependency direction, contracts and generated files.
	@"$$(hack/tool.sh golangci-lint)/golangci-lint" run ./...
	@cd api && "$$(../hack/tool.sh buf)/buf" lint

.PHONY: bench
bench: ## Measure against PostgreSQL's logical replication. BENCH picks one.
	@hack/deps.sh demo
	@go run ./test/bench $(BENCH)

.PHONY: sbom
sbom: build ## Write the bill of materials of the binary (CycloneDX) to bin/db-controller.cdx.json.
	@go run ./hack/sbom bin/db-controller > bin/db-controller.cdx.json
	@echo bin/db-controller.cdx.json

.PHONY: vuln
vuln: ## Look for known vulnerabilities that the code reaches. Needs https://vuln.go.dev or GOVULNDB.
	@hack/vuln.sh

.PHONY: reproducible
reproducible: ## Build the binary twice, in two folders and with two caches, and compare the bytes.
	@VERSION=$(VERSION) hack/reproducible.sh

.PHONY: generate
generate: ## Write the generated files (deep copies, CRDs, RBAC, protobuf).
	@hack/generate.sh

.PHONY: verify-generate
verify-generate: ## Fail if a generated file is stale.
	@hack/generate.sh --check
