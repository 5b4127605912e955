# Everything the project builds and checks. "make help" lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
export CGO_ENABLED := 0
GO ?= go

# Seeds of demo and tests: guest kernel and image, made once.
BUILD := $(CURDIR)/build
SEED := $(BUILD)/home

PACKAGES_RUN := qemu-system-x86 e2fsprogs xz-utils
PACKAGES_IMAGE := mmdebstrap uidmap
PACKAGES_TEST := strace util-linux attr procps iproute2 qemu-utils btrfs-progs

GOFILES := $(shell git ls-files '*.go' 2>/dev/null)

.PHONY: help build check test race fuzz demo bench soak docs packages packages-test seed clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf " %-14s%s\n",$$1,$$2}' $(MAKEFILE_LIST)

include make/*.mk

build: agent msb-fetch ## Build bin/msb, one static binary with the guest agent and msb-fetch inside
	$(GO) build -trimpath -ldflags '-s -w' -o bin/msb ./cmd/msb

check: ## gofmt, go vet, staticcheck, layering, doc links
	@test -z "$$(gofmt -l $(GOFILES))" || { gofmt -l $(GOFILES); echo "gofmt: the files above need formatting"; exit 1; }
	$(GO) vet ./...
	cd tools && $(GO) build -o ../build/staticcheck honnef.co/go/tools/cmd/staticcheck
	build/staticcheck ./...
	GOARCH=arm64 $(GO) build ./...
	$(GO) test -count=1 ./internal

packages: ## Install what demo needs: QEMU, e2fsprogs, mmdebstrap (Debian, as root)
	@scripts/packages.sh $(PACKAGES_RUN) $(PACKAGES_IMAGE)

packages-test: ## Install what tests need beyond that
	@scripts/packages.sh $(PACKAGES_RUN) $(PACKAGES_IMAGE) $(PACKAGES_TEST)

seed: build demo-image ## Guest kernel and image for demo and tests, cached in build/
	@MSB_HOME=$(SEED) $(MAKE) --no-print-directory kernel-stock
	@MSB_HOME=$(SEED) bin/msb image load -q $(BUILD)/demo-image

demo: packages seed ## The main job end to end: seed a volume, run a program on it, read the result
	@MSB_HOME=$(SEED) scripts/demo.sh bin/msb

test: packages-test seed ## Install what tests need and run all of them
	@scripts/test.sh

race: packages-test seed ## Tests of the concurrent packages under the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race -count=1 ./internal/supervisor/... ./internal/vhostuser/... ./internal/fuseserver/... ./internal/volstore/... ./internal/volumefs/... ./internal/ledger/... ./internal/agentclient/...

fuzz: ## Every fuzz target for a minute
	@scripts/fuzz.sh 60s

soak: packages-test seed ## Long runs: kill sweeps, races, fuzzing (hours)
	@scripts/soak.sh

bench: packages-test seed ## Measure and write the tables of README and docs/performance.md
	$(GO) run ./bench/report

docs: ## Rewrite generated documents
	$(GO) generate ./...

clean: ## Remove what was built
	rm -rf bin build
