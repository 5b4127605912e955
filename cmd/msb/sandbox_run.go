package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newRunCmd() *cobra.Command {
	var ex execFlags
	var detach bool
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [-- COMMAND...]",
		Short: "Boot a sandbox and run a program in it",
		Long: `Boot a sandbox from an image and run a program in it: the image's own, or the
one after --. The exit code is the program's.

Without --name the sandbox has a random name and is removed when the program has
ended. With the name of an existing sandbox that one is used, started if need be,
and the flags that describe a sandbox are ignored with a warning.`,
		Example: `  msb run python -- python3 -c 'print(6*7)'
  msb run -v cache:/root/.cache python -- pip install requests`,
	}
	f := addSandboxFlags(cmd)
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "boot in the background, print the name, run no program")
	cmd.Flags().BoolVarP(&ex.tty, "tty", "t", false, "give the program a terminal (not supported yet)")
	cmd.Flags().Var(&ex.timeout, "timeout", "kill the program when it runs longer")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		before, command, err := splitDash(cmd, args)
		if err != nil {
			return err
		}
		execOpts, err := ex.options()
		if err != nil {
			return err
		}
		if detach {
			if len(command) > 0 {
				return usagef("msb run --detach runs no program: leave the command out, then msb exec NAME -- COMMAND")
			}
			return createSandbox(cmd, f, before)
		}
		sb, done, err := sandboxForRun(cmd, f, before)
		if err != nil {
			return err
		}
		return runIn(cmd, sb, command, execOpts, done)
	}
	cmd.ValidArgsFunction = completeImageOfSandbox
	return cmd
}

// sandboxForRun returns the sandbox that run works in and how to leave it.
func sandboxForRun(cmd *cobra.Command, f *sandboxFlags, before []string) (*microsandbox.Sandbox, func(*microsandbox.Sandbox) error, error) {
	ctx := cmd.Context()
	if f.name != "" {
		h, err := microsandbox.GetSandbox(ctx, f.name)
		if err == nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "msb: sandbox %q exists: flags that describe a sandbox are ignored\n", f.name)
			return reuse(ctx, h)
		}
		if !microsandbox.IsKind(err, microsandbox.ErrSandboxNotFound) {
			return nil, nil, err
		}
	}
	if len(before) == 0 {
		return nil, nil, usagef("msb run: an image is needed")
	}
	opts, err := f.options(before[0])
	if err != nil {
		return nil, nil, err
	}
	name := f.name
	if name == "" {
		name = randomName()
		opts = append(opts, microsandbox.WithEphemeral(true))
	}
	p := newLaunchProgress(cmd.ErrOrStderr(), f.quiet)
	sb, err := microsandbox.CreateSandbox(ctx, name, append(opts, microsandbox.WithProgress(p.report))...)
	p.finish()
	if err != nil {
		return nil, nil, err
	}
	return sb, stopAfterwards, nil
}

// reuse connects to an existing sandbox, which keeps running if it did.
func reuse(ctx context.Context, h *microsandbox.SandboxHandle) (*microsandbox.Sandbox, func(*microsandbox.Sandbox) error, error) {
	if h.Status() == microsandbox.SandboxStatusRunning {
		sb, err := h.Connect(ctx)
		return sb, func(*microsandbox.Sandbox) error { return nil }, err
	}
	sb, err := h.Start(ctx)
	return sb, stopAfterwards, err
}

// stopAfterwards stops a sandbox that this command started, also when the
// command was interrupted.
func stopAfterwards(sb *microsandbox.Sandbox) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	defer sb.Close()
	err := sb.Stop(ctx, microsandbox.WithStopTimeout(5*time.Second))
	if microsandbox.IsKind(err, microsandbox.ErrSandboxNotRunning) || microsandbox.IsKind(err, microsandbox.ErrSandboxNotFound) {
		return nil
	}
	return err
}

// runIn runs the command, or the image's own, and leaves the sandbox.
func runIn(cmd *cobra.Command, sb *microsandbox.Sandbox, command []string, opts []microsandbox.ExecOption, done func(*microsandbox.Sandbox) error) error {
	ctx := cmd.Context()
	var h *microsandbox.ExecHandle
	var err error
	if len(command) > 0 {
		h, err = sb.ExecStream(ctx, command[0], command[1:], opts...)
	} else {
		h, err = sb.ExecDefaultStream(ctx, opts...)
	}
	if err == nil {
		err = stream(ctx, cmd, h)
	}
	if microsandbox.IsKind(err, microsandbox.ErrSandboxNotRunning) && ctx.Err() == nil {
		err = crashed(sb, err)
	}
	if derr := done(sb); err == nil {
		err = derr
	}
	return err
}

// crashWait is how long a sandbox whose agent has gone may take to end.
const crashWait = 5 * time.Second

// crashed adds why the sandbox ended to the error of an operation it cut off.
func crashed(sb *microsandbox.Sandbox, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), crashWait)
	defer cancel()
	res, werr := sb.WaitUntilStopped(ctx)
	if werr != nil || res.Source == nil || res.Status != microsandbox.SandboxStatusCrashed {
		return err
	}
	return &microsandbox.Error{Kind: microsandbox.ErrSandboxNotRunning, Message: fmt.Sprintf("sandbox %q crashed: %s", sb.Name(), *res.Source)}
}

func randomName() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return "msb-" + hex.EncodeToString(b[:])
}

func newCreateCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create [flags] IMAGE",
		Short: "Boot a sandbox in the background and print its name",
		Example: `  msb create --name api -v pip-cache:/root/.cache/pip python
  msb exec api -- pip install requests`,
	}
	f := addSandboxFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return createSandbox(cmd, f, args) }
	cmd.ValidArgsFunction = completeImageOfSandbox
	return cmd
}

func createSandbox(cmd *cobra.Command, f *sandboxFlags, args []string) error {
	if len(args) != 1 {
		return usagef("%s: one image is needed, %d given", cmd.CommandPath(), len(args))
	}
	opts, err := f.options(args[0])
	if err != nil {
		return err
	}
	if f.name == "" {
		f.name = randomName()
	}
	p := newLaunchProgress(cmd.ErrOrStderr(), f.quiet)
	sb, err := microsandbox.CreateSandbox(cmd.Context(), f.name, append(opts, microsandbox.WithDetached(), microsandbox.WithProgress(p.report))...)
	p.finish()
	if err != nil {
		return err
	}
	if !f.quiet {
		fmt.Fprintln(cmd.OutOrStdout(), f.name)
	}
	return sb.Close()
}

func newExecCmd() *cobra.Command {
	var ex execFlags
	var quiet bool
	cmd := &cobra.Command{
		Use:   "exec [flags] NAME [-- COMMAND...]",
		Short: "Run a program in a running sandbox",
		Long: `Run a program in a running sandbox: the one after --, else the image's own. Input
and output are streamed; the exit code is the program's, 127 when it is not found
and 126 when it cannot be executed.`,
		Example: `  msb exec api -- python3 -c 'print(6*7)'
  tar c src | msb exec -w /root api -- tar x`,
		ValidArgsFunction: completeSandboxes(false),
	}
	fl := cmd.Flags()
	fl.StringArrayVarP(&ex.env, "env", "e", nil, "environment variable `KEY[=VALUE]`; without a value the present one is passed on (repeatable)")
	fl.StringVarP(&ex.workdir, "workdir", "w", "", "working `DIRECTORY`")
	fl.StringVarP(&ex.user, "user", "u", "", "`USER`: name, uid, name:group")
	fl.BoolVarP(&ex.tty, "tty", "t", false, "give the program a terminal (not supported yet)")
	fl.Var(&ex.timeout, "timeout", "kill the program when it runs longer")
	quietFlag(cmd, &quiet, "accepted for compatibility")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		before, command, err := splitDash(cmd, args)
		if err != nil {
			return err
		}
		if len(before) != 1 {
			return usagef("msb exec: the name of a sandbox is needed")
		}
		opts, err := ex.options()
		if err != nil {
			return err
		}
		h, err := microsandbox.GetSandbox(cmd.Context(), before[0])
		if err != nil {
			return err
		}
		sb, err := h.Connect(cmd.Context())
		if err != nil {
			return err
		}
		return runIn(cmd, sb, command, opts, func(*microsandbox.Sandbox) error { return nil })
	}
	return cmd
}
