package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// Exit codes for a program that could not be run, as shells have them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// stream runs a program to its end: its input is ours, its output goes where it
// belongs, its exit code becomes ours.
func stream(ctx context.Context, cmd *cobra.Command, h *microsandbox.ExecHandle) error {
	defer h.Close()
	if in := h.TakeStdin(); in != nil {
		go feed(in, cmd.InOrStdin())
	}
	for {
		ev, err := h.Recv(ctx)
		if err != nil {
			return err
		}
		var werr error
		switch ev.Kind {
		case microsandbox.ExecEventStdout:
			_, werr = os.Stdout.Write(ev.Data)
		case microsandbox.ExecEventStderr:
			_, werr = os.Stderr.Write(ev.Data)
		case microsandbox.ExecEventExited:
			if ev.ExitCode == 0 {
				return nil
			}
			return exitError{ev.ExitCode & 0xff}
		case microsandbox.ExecEventFailed:
			return cannotRun(cmd, ev.Failure)
		case microsandbox.ExecEventDone:
			return nil
		}
		if werr != nil { // our reader has gone, as in "| head"
			return errors.Join(werr, h.Kill(ctx))
		}
	}
}

// feed passes our input on. It may be blocked in a read when the program ends;
// it then ends with this process.
func feed(in *microsandbox.ExecSink, r io.Reader) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{in}, r, make([]byte, 32<<10))
	_ = in.Close()
}

// cannotRun says why and gives the exit code a shell would.
func cannotRun(cmd *cobra.Command, f *microsandbox.ExecFailure) error {
	code := exitFailure
	switch f.Kind {
	case "not_found":
		code = exitNotFound
	case "permission_denied", "not_executable":
		code = exitNotExecutable
	}
	printError(cmd.ErrOrStderr(), &microsandbox.Error{Kind: microsandbox.ErrExecFailed, Message: "cannot run " + f.Path + ": " + strings.TrimPrefix(f.Message, f.Path+": ")})
	return exitError{code}
}
