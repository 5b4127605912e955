package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// sandboxFlags are the flags that describe a sandbox, on run and create.
type sandboxFlags struct {
	name, memory, workdir, shell, hostname, user, pull, accel, upper string
	cpus                                                             uint8
	env, entrypoint                                                  []string
	labels                                                           labelsFlag
	bootTimeout                                                      durationFlag
	insecure, quiet                                                  bool
	mounts                                                           *mountFlags
}

func addSandboxFlags(cmd *cobra.Command) *sandboxFlags {
	f := &sandboxFlags{}
	fl := cmd.Flags()
	fl.StringVarP(&f.name, "name", "n", "", "`NAME` of the sandbox")
	fl.Uint8VarP(&f.cpus, "cpus", "c", 0, "`NUMBER` of virtual CPUs (default 1)")
	fl.StringVarP(&f.memory, "memory", "m", "", "guest memory, a `SIZE` such as 512M or 2G (default 512M)")
	fl.StringVarP(&f.workdir, "workdir", "w", "", "working `DIRECTORY` of programs (default: the image's)")
	fl.StringVar(&f.shell, "shell", "", "`PATH` of the sandbox's shell (default /bin/sh)")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "environment variable `KEY[=VALUE]`; without a value the present one is passed on (repeatable)")
	fl.Var(&f.labels, "label", "label `KEY[=VALUE]` of the sandbox (repeatable)")
	fl.StringArrayVar(&f.entrypoint, "entrypoint", nil, "replaces the image's entrypoint (repeat for each `WORD`)")
	fl.StringVarP(&f.hostname, "hostname", "H", "", "host `NAME` of the guest (default: the sandbox's name)")
	fl.StringVarP(&f.user, "user", "u", "", "`USER` of programs: name, uid, name:group (default: the image's)")
	fl.StringVar(&f.pull, "pull", "", "`WHEN` to pull the image: always, if-missing or never (default if-missing)")
	fl.BoolVar(&f.insecure, "insecure", false, "allow plain http to the registry")
	fl.StringVar(&f.upper, "oci-upper-size", "", "`SIZE` of the sandbox's writable layer (default 4G)")
	fl.StringVar(&f.accel, "accel", "", "`ACCELERATOR`: auto, kvm or tcg (default auto)")
	fl.Var(&f.bootTimeout, "boot-timeout", "how long the guest may take to boot (default 1m)")
	quietFlag(cmd, &f.quiet, "no progress and no name")
	f.mounts = addMountFlags(cmd)
	for _, name := range []string{"cpus", "memory", "workdir", "shell", "env", "label", "entrypoint", "hostname", "user", "oci-upper-size", "boot-timeout"} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	_ = cmd.RegisterFlagCompletionFunc("name", completeSandboxName)
	_ = cmd.RegisterFlagCompletionFunc("volume", completeVolumeMount)
	_ = cmd.RegisterFlagCompletionFunc("mount-named", completeVolumeMount)
	_ = cmd.RegisterFlagCompletionFunc("tmpfs", cobra.NoFileCompletions)
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions([]string{"always", "if-missing", "never"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("accel", cobra.FixedCompletions([]string{"auto", "kvm", "tcg"}, cobra.ShellCompDirectiveNoFileComp))
	return f
}

// options turns the flags into sandbox options; mistakes are usage errors.
func (f *sandboxFlags) options(image string) ([]microsandbox.SandboxOption, error) {
	opts := []microsandbox.SandboxOption{
		microsandbox.WithImage(image), microsandbox.WithCPUs(f.cpus), microsandbox.WithWorkdir(f.workdir),
		microsandbox.WithShell(f.shell), microsandbox.WithHostname(f.hostname), microsandbox.WithUser(f.user),
		microsandbox.WithAccelerator(f.accel), microsandbox.WithBootTimeout(time.Duration(f.bootTimeout)),
	}
	switch p := microsandbox.PullPolicy(f.pull); p {
	case microsandbox.PullPolicyDefault, microsandbox.PullPolicyAlways, microsandbox.PullPolicyIfMissing, microsandbox.PullPolicyNever:
		opts = append(opts, microsandbox.WithPullPolicy(p))
	default:
		return nil, usagef("--pull %q is not always, if-missing or never", f.pull)
	}
	if !slices.Contains([]string{"", "auto", "kvm", "tcg"}, f.accel) {
		return nil, usagef("--accel %q is not auto, kvm or tcg", f.accel)
	}
	if f.insecure {
		opts = append(opts, microsandbox.WithRegistryInsecure())
	}
	for _, size := range []struct {
		flag, text string
		with       func(uint32) microsandbox.SandboxOption
	}{{"--memory", f.memory, microsandbox.WithMemory}, {"--oci-upper-size", f.upper, microsandbox.WithOCIUpperSize}} {
		if size.text == "" {
			continue
		}
		mib, err := parseMiB(size.text)
		if err != nil {
			return nil, usagef("%s: %w", size.flag, err)
		}
		opts = append(opts, size.with(mib))
	}
	if len(f.entrypoint) > 0 {
		opts = append(opts, microsandbox.WithEntrypoint(f.entrypoint...))
	}
	env, err := parseEnv(f.env)
	if err != nil {
		return nil, err
	}
	mounts, err := f.mounts.options()
	if err != nil {
		return nil, err
	}
	return append(append(opts, microsandbox.WithEnv(env), microsandbox.WithLabels(f.labels)), mounts...), nil
}

// parseEnv reads K=V and K, the latter with the value it has here.
func parseEnv(list []string) (map[string]string, error) {
	env := map[string]string{}
	for _, kv := range list {
		k, v, ok := strings.Cut(kv, "=")
		if k == "" {
			return nil, usagef("--env %q has no name", kv)
		}
		if !ok {
			if v, ok = os.LookupEnv(k); !ok {
				continue
			}
		}
		env[k] = v
	}
	return env, nil
}

// execFlags are the flags that describe one program, on run and exec.
type execFlags struct {
	env           []string
	workdir, user string
	timeout       durationFlag
	tty           bool
}

func (f *execFlags) options() ([]microsandbox.ExecOption, error) {
	if f.tty {
		return nil, &microsandbox.Error{Kind: microsandbox.ErrUnsupportedOperation, Message: "a terminal in the guest (--tty) is not supported yet", Hint: "leave --tty out: input and output are streamed"}
	}
	opts := []microsandbox.ExecOption{microsandbox.WithExecStdinPipe()}
	env, err := parseEnv(f.env)
	if err != nil {
		return nil, err
	}
	if len(env) > 0 {
		opts = append(opts, microsandbox.WithExecEnv(env))
	}
	if f.workdir != "" {
		opts = append(opts, microsandbox.WithExecCwd(f.workdir))
	}
	if f.user != "" {
		opts = append(opts, microsandbox.WithExecUser(f.user))
	}
	if f.timeout > 0 {
		opts = append(opts, microsandbox.WithExecTimeout(time.Duration(f.timeout)))
	}
	return opts, nil
}

// splitDash separates what comes before "--" from the command after it.
func splitDash(cmd *cobra.Command, args []string) (before, command []string, err error) {
	at := cmd.ArgsLenAtDash()
	if at < 0 {
		at = len(args)
	}
	before, command = args[:at], args[at:]
	if len(before) > 1 {
		return nil, nil, usagef("%s: unexpected argument %q; a command goes after --, as in %s", cmd.CommandPath(), before[1], fmt.Sprintf("%s %s -- %s", cmd.CommandPath(), before[0], strings.Join(before[1:], " ")))
	}
	return before, command, nil
}
