// Command msb manages volumes, images and sandboxes.
//
// Results go to stdout, talk to stderr. Exit codes: 0 done, 1 failed, 2 wrong
// usage, 130 interrupted, 143 terminated; run and exec pass the guest program's
// own code on, 126 and 127 for one that cannot be executed or found.
// docs/cli.md has all commands.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
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
	args := argv[min(1, len(argv)):]
	ctx, stop := untilSignal(context.Background(), isShort(args))
	defer stop()
	root := newRootCmd(args...)
	root.SetArgs(args)
	out := &output{File: os.Stdout}
	root.SetOut(out)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		err = out.failed
	}
	if isUsage(err) && hintOf(err) == "" {
		err = hinted{err, "see " + cmd.CommandPath() + " --help"}
	}
	code := exitCode(ctx, err)
	printEnd(os.Stderr, ctx, err)
	return code
}

// interrupt is the cause of a context that a signal has ended.
type interrupt struct{ sig syscall.Signal }

func (i interrupt) Error() string {
	if i.sig == syscall.SIGTERM {
		return "terminated"
	}
	return "interrupted"
}

// Is makes it a cancellation as any other.
func (i interrupt) Is(target error) bool { return target == context.Canceled }

// graceless is how long after its start a short command still ends by a signal's
// default action. Whoever is killed so early leaves nothing that the next command
// does not heal, and watching signals costs two threads, a tenth of its time.
const graceless = 20 * time.Millisecond

// isShort tells whether a command line is that of a command that is done in
// milliseconds, or else is not missed by anybody before it has begun.
func isShort(args []string) bool {
	switch {
	case len(args) == 1:
		return args[0] == "--version" || args[0] == "version"
	case len(args) < 2 || args[0] != "volume" && args[0] != "vol":
		return false
	}
	return slices.Contains([]string{"create", "ls", "list", "inspect", "rm", "remove"}, args[1])
}

// untilSignal returns a context that ends with the first SIGINT, SIGTERM or
// SIGHUP (the terminal has gone); a second one ends the process at once.
func untilSignal(parent context.Context, short bool) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	if !short {
		return ctx, watchSignals(ctx, cancel)
	}
	late := time.AfterFunc(graceless, func() { watchSignals(ctx, cancel) })
	return ctx, func() {
		late.Stop()
		cancel(nil)
	}
}

// watchSignals begins to watch; what it returns ends that and ctx.
func watchSignals(ctx context.Context, cancel context.CancelCauseFunc) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		defer signal.Stop(signals)
		select {
		case s := <-signals:
			sig, _ := s.(syscall.Signal)
			cancel(interrupt{sig})
		case <-ctx.Done():
		}
	}()
	return func() { cancel(nil) }
}

// Exit codes that are not a guest program's.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
	exitSignal  = 128 // plus the signal's number
)

// hinted is an error with a way out.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// exitError ends the command with a code and says nothing: it is an answer, a
// guest program's exit code for instance. No signal changes it.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// errSaid ends the command as any failure does and says nothing: whoever returns
// it has said what failed.
var errSaid = errors.New("failed")

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// usagef returns a usageError.
func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitCode is the one place where errors become exit codes. Whatever error comes
// out of a command that a signal has cut off, the signal is the reason; a command
// that got done all the same is done.
func exitCode(ctx context.Context, err error) int {
	var exit exitError
	sig, cutOff := signalled(ctx)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case isUsage(err):
		return exitUsage
	case cutOff:
		return exitSignal + int(sig.sig)
	}
	return exitFailure
}

func isUsage(err error) bool {
	var usage usageError
	return errors.As(err, &usage)
}

func isSilent(err error) bool {
	var exit exitError
	return errors.As(err, &exit) || errors.Is(err, errSaid)
}

// signalled returns the signal that has ended ctx.
func signalled(ctx context.Context) (sig interrupt, ok bool) {
	ok = errors.As(context.Cause(ctx), &sig)
	return sig, ok
}

// printEnd says how the command ended, unless it went well or who ended it has
// spoken. What a signal cut off needs no explanation; what failed beside it does.
func printEnd(w io.Writer, ctx context.Context, err error) {
	var exit exitError
	sig, cutOff := signalled(ctx)
	switch {
	case err == nil || errors.As(err, &exit):
	case isUsage(err) || !cutOff:
		if !isSilent(err) {
			printError(w, err)
		}
	case isSilent(err) || errors.Is(err, context.Canceled):
		fmt.Fprintln(w, "msb:", sig)
	default:
		fmt.Fprintln(w, "msb:", sig)
		printError(w, err)
	}
}

// report says that one of several things failed, unless a signal has cut it off:
// printEnd tells of that.
func report(ctx context.Context, w io.Writer, err error) {
	if _, cutOff := signalled(ctx); cutOff && errors.Is(err, context.Canceled) {
		return
	}
	printError(w, err)
}

// printError writes an error as "msb: error: ..." and its hint, if it has one,
// as "msb: hint: ...".
func printError(w io.Writer, err error) {
	fmt.Fprintln(w, "msb: error:", printableLines(err.Error()))
	if hint := hintOf(err); hint != "" {
		fmt.Fprintln(w, "msb: hint:", printableLines(hint))
	}
}

// printableLines is printable for each line of a text. An error may quote what
// a guest or a registry has said.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

// hintOf is the way out that an error names, or the command that helps with
// errors of its kind.
func hintOf(err error) string {
	var h hinted
	if errors.As(err, &h) {
		return h.hint
	}
	var pub *microsandbox.Error
	if errors.As(err, &pub) && pub.Hint != "" {
		return pub.Hint
	}
	var in *errdefs.Error
	if errors.As(err, &in) && in.Hint != "" {
		return in.Hint
	}
	switch {
	case microsandbox.IsKind(err, microsandbox.ErrSandboxNotFound):
		return "`msb ls` lists the sandboxes"
	case microsandbox.IsKind(err, microsandbox.ErrVolumeNotFound):
		return "`msb volume ls` lists the volumes, `msb volume create` makes one"
	case errors.Is(err, fs.ErrPermission):
		return homeHint()
	}
	return ""
}

// homeHint is the way out of a home that is somebody else's or cannot be made;
// "" if the home is not to blame.
func homeHint() string {
	h, err := home.Resolve()
	if err != nil || unix.Access(string(h), unix.R_OK|unix.W_OK|unix.X_OK) == nil {
		return ""
	}
	return fmt.Sprintf("%s cannot be used by you: set %s to a directory of yours", h, home.EnvVar)
}
