// Command msb manages volumes, images and sandboxes.
//
// Results go to stdout, talk to stderr. Exit codes: 0 done, 1 failed, 2 wrong
// usage, 130 interrupted; run and exec pass the guest program's own code on,
// 126 and 127 for one that cannot be executed or found.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

func main() { os.Exit(run(os.Args)) }

// run is main with an exit code, so that the script tests can be msb.
func run(argv []string) int {
	if err := failpoint.ArmFromEnv(); err != nil {
		fmt.Fprintln(os.Stderr, "msb: error:", err)
		return exitUsage
	}
	if len(argv) > 1 {
		if process, ok := processes[argv[1]]; ok {
			return process(argv[2:])
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once

	root := newRootCmd()
	root.SetArgs(argv[min(1, len(argv)):])
	err := root.ExecuteContext(ctx)
	code := exitCode(ctx, err)
	if err != nil && !isSilent(err) {
		printError(os.Stderr, err)
	}
	return code
}

// Exit codes that are not a guest program's.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// exitError ends the command with a code and says nothing: whoever returns it
// has said what there is to say (a guest program's exit code, for instance).
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// usagef returns a usageError.
func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitCode is the one place where errors become exit codes.
func exitCode(ctx context.Context, err error) int {
	var exit exitError
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &usage):
		return exitUsage
	case ctx.Err() != nil:
		return exitInterrupted
	}
	return exitFailure
}

func isSilent(err error) bool {
	var exit exitError
	return errors.As(err, &exit)
}

// printError writes an error as "msb: error: ..." and its hint, if it has one,
// as "msb: hint: ...".
func printError(w io.Writer, err error) {
	fmt.Fprintln(w, "msb: error:", err)
	if hint := hintOf(err); hint != "" {
		fmt.Fprintln(w, "msb: hint:", hint)
	}
}

func hintOf(err error) string {
	var pub *microsandbox.Error
	if errors.As(err, &pub) && pub.Hint != "" {
		return pub.Hint
	}
	var in *errdefs.Error
	if errors.As(err, &in) {
		return in.Hint
	}
	return ""
}
