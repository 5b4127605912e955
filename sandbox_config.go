package microsandbox

import (
	"maps"
	"time"
)

// SandboxConfig is the definition of a sandbox. The zero value of a field means
// "not set": the default in brackets applies. Setters of [SandboxOption] only
// fill it; everything is checked when the sandbox is created, before an image is
// pulled, a volume is made or a machine is started.
type SandboxConfig struct {
	Name      string // set by CreateSandbox
	Image     string // OCI reference, required
	MemoryMiB uint32 // guest memory in MiB [512]
	CPUs      uint8  // virtual CPUs [1]

	Workdir  string // of every program [the image's, else /]
	Shell    string // of Shell [/bin/sh]
	Hostname string // [the sandbox's name]
	User     string // name, uid, name:group or uid:gid [the image's, else root]

	Env        map[string]string // over the image's environment
	Labels     map[string]string // kept in the record, for filtering
	Entrypoint []string          // replaces the image's entrypoint
	Cmd        []string          // replaces the image's command

	// Detached sandboxes outlive the process that made them.
	Detached bool
	// Ephemeral sandboxes are removed with their state when they stop.
	Ephemeral bool

	PullPolicy       PullPolicy // [if-missing]
	RegistryAuth     *RegistryAuth
	RegistryInsecure bool // plain http for registries that are not on loopback

	// OCIUpperSizeMiB is the size of the sandbox's own writable layer in MiB,
	// an ext4 image allocated sparsely [4096].
	OCIUpperSizeMiB uint32

	// Volumes maps guest paths to mounts.
	Volumes map[string]MountConfig

	mountBuilders []mountEntry // of WithVolume and WithVolumeMounts, in caller order

	// Accelerator is auto, kvm or tcg [auto, or $MSB_ACCEL].
	Accelerator string
	// BootTimeout bounds the time from start to a guest that serves requests
	// [60 s].
	BootTimeout time.Duration
	// Progress, if set, receives one line per step of a launch. It is called
	// from the goroutine that launches.
	Progress func(LaunchProgress) `json:"-"`
}

// LaunchProgress is one step of a launch, for display.
type LaunchProgress struct {
	Step    string // "pull", "rootfs", "volumes", "boot", "ready"
	Message string
	Done    int64 // bytes, of steps that count them
	Total   int64 // bytes, 0 if not known
}

// SandboxOption sets fields of a sandbox definition.
type SandboxOption func(*SandboxConfig)

// PullPolicy says when an image is pulled.
type PullPolicy string

// Pull policies.
const (
	PullPolicyDefault   PullPolicy = ""
	PullPolicyAlways    PullPolicy = "always"
	PullPolicyIfMissing PullPolicy = "if-missing"
	PullPolicyNever     PullPolicy = "never"
)

// RegistryAuth is the account used with a registry.
type RegistryAuth struct {
	Username string
	Password string
}

// WithImage sets the OCI image reference.
func WithImage(image string) SandboxOption { return func(c *SandboxConfig) { c.Image = image } }

// WithMemory sets the guest's memory in MiB.
func WithMemory(mebibytes uint32) SandboxOption {
	return func(c *SandboxConfig) { c.MemoryMiB = mebibytes }
}

// WithCPUs sets the number of virtual CPUs.
func WithCPUs(cpus uint8) SandboxOption { return func(c *SandboxConfig) { c.CPUs = cpus } }

// WithWorkdir sets the working directory of programs.
func WithWorkdir(path string) SandboxOption { return func(c *SandboxConfig) { c.Workdir = path } }

// WithShell sets the shell that Shell runs.
func WithShell(shell string) SandboxOption { return func(c *SandboxConfig) { c.Shell = shell } }

// WithHostname sets the guest's host name.
func WithHostname(hostname string) SandboxOption {
	return func(c *SandboxConfig) { c.Hostname = hostname }
}

// WithUser sets the user programs run as.
func WithUser(user string) SandboxOption { return func(c *SandboxConfig) { c.User = user } }

// WithEnv merges variables into the environment of programs; later calls win.
func WithEnv(env map[string]string) SandboxOption {
	return func(c *SandboxConfig) { c.Env = merge(c.Env, env) }
}

// WithLabels merges labels; later calls win.
func WithLabels(labels map[string]string) SandboxOption {
	return func(c *SandboxConfig) { c.Labels = merge(c.Labels, labels) }
}

// WithLabel sets one label.
func WithLabel(key, value string) SandboxOption {
	return WithLabels(map[string]string{key: value})
}

// WithDetached lets the sandbox outlive the process that makes it.
func WithDetached() SandboxOption { return func(c *SandboxConfig) { c.Detached = true } }

// WithEphemeral removes the sandbox with its state when it stops.
func WithEphemeral(ephemeral bool) SandboxOption {
	return func(c *SandboxConfig) { c.Ephemeral = ephemeral }
}

// WithEntrypoint replaces the image's entrypoint.
func WithEntrypoint(cmd ...string) SandboxOption {
	return func(c *SandboxConfig) { c.Entrypoint = cmd }
}

// WithCmd replaces the image's command.
func WithCmd(cmd ...string) SandboxOption { return func(c *SandboxConfig) { c.Cmd = cmd } }

// WithPullPolicy says when the image is pulled.
func WithPullPolicy(p PullPolicy) SandboxOption { return func(c *SandboxConfig) { c.PullPolicy = p } }

// WithRegistryAuth sets the account used to pull the image.
func WithRegistryAuth(auth RegistryAuth) SandboxOption {
	return func(c *SandboxConfig) { c.RegistryAuth = &auth }
}

// WithRegistryInsecure allows plain http to the image's registry.
func WithRegistryInsecure() SandboxOption {
	return func(c *SandboxConfig) { c.RegistryInsecure = true }
}

// WithOCIUpperSize sets the size of the sandbox's writable layer in MiB.
func WithOCIUpperSize(mebibytes uint32) SandboxOption {
	return func(c *SandboxConfig) { c.OCIUpperSizeMiB = mebibytes }
}

// WithAccelerator chooses auto, kvm or tcg.
func WithAccelerator(name string) SandboxOption {
	return func(c *SandboxConfig) { c.Accelerator = name }
}

// WithBootTimeout bounds the time a guest may take to boot.
func WithBootTimeout(d time.Duration) SandboxOption {
	return func(c *SandboxConfig) { c.BootTimeout = d }
}

// WithProgress receives the steps of a launch.
func WithProgress(f func(LaunchProgress)) SandboxOption {
	return func(c *SandboxConfig) { c.Progress = f }
}

func merge(dst, src map[string]string) map[string]string {
	if dst == nil {
		dst = make(map[string]string, len(src))
	}
	maps.Copy(dst, src)
	return dst
}
