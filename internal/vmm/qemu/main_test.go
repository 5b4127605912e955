package qemu

import (
	"os"
	"testing"
	"time"
)

// standInEnv makes the test binary play a program that fails in a certain way.
const standInEnv = "QEMU_TEST_STAND_IN"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == ProbeProcess {
		os.Exit(standInProbe(os.Getenv(standInEnv)))
	}
	if kind := os.Getenv(standInEnv); kind != "" {
		os.Exit(standInQEMU(kind))
	}
	os.Exit(m.Run())
}

// hang does nothing for ever, without the runtime calling it a deadlock.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}
