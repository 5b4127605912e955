// Package guesttest holds the tests that run inside a guest, on the directory
// named by an environment variable. Package conformance compiles them to a
// static binary, runs it in the guest and, for comparison, on the host.
//
// The same binary, called with the name of a command instead of flags, is the
// small program that tests in the guest need: see commands in main_test.go.
package guesttest

// DirEnv names the directory that the tests work in. Each makes a directory of
// its own there and removes it.
const DirEnv = "MSB_CONFORMANCE_DIR"

// UnmappedEnv, if not empty, says that files there have no shared mappings.
const UnmappedEnv = "MSB_FSX_UNMAPPED"
