package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/cmd/msb/agentbin"
	"github.com/microsandbox-go/microsandbox/cmd/msb/fetchbin"
	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// diagnosis is one line of msb doctor.
type diagnosis struct {
	Name     string `json:"name"`
	Status   string `json:"status"`           // ok, slow, weak, missing
	Required bool   `json:"required"`         // for sandboxes
	Detail   string `json:"detail"`           // what was found
	Remedy   string `json:"remedy,omitempty"` // what to do, "" when ok
}

// Statuses of a diagnosis.
const (
	statusOK      = "ok"
	statusSlow    = "slow"
	statusWeak    = "weak"
	statusMissing = "missing"
)

func newDoctorCmd() *cobra.Command {
	var format outputFormat
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine offers, what is missing and how to mend it",
		Long: `Look at everything volumes and sandboxes need. A line says ok, slow (works, at a
cost), weak (a line of defence is missing) or missing; what is not ok says what to
do. The exit code is 1 only if something is missing that sandboxes cannot do
without; volumes need none of it but the home.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := home.Resolve()
			if err != nil {
				return err
			}
			list := diagnose(cmd.Context(), h)
			if format == formatJSON {
				err = printJSON(cmd.OutOrStdout(), list)
			} else {
				err = printDiagnoses(cmd, list)
			}
			if err != nil {
				return err
			}
			for _, d := range list {
				if d.Required && d.Status == statusMissing {
					return errSaid
				}
			}
			return nil
		},
	}
	formatFlag(cmd, &format)
	return cmd
}

func printDiagnoses(cmd *cobra.Command, list []diagnosis) error {
	t := newTable(cmd.OutOrStdout(), "STATUS", "WHAT", "FOUND")
	for _, d := range list {
		t.row(d.Status, d.Name, d.Detail)
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, d := range list {
		if d.Remedy != "" {
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", d.Name, printable(d.Remedy))
		}
	}
	return nil
}

// diagnose looks at everything; it changes nothing but caches in the home.
func diagnose(ctx context.Context, h home.Dir) []diagnosis {
	list := []diagnosis{
		homeDiagnosis(h),
		volumesDiagnosis(ctx),
		xattrDiagnosis(h),
		toolDiagnosis("mkfs.ext4", "disk volumes and the writable layer of sandboxes", "apt-get install e2fsprogs", true),
		qemuDiagnosis(),
		accelDiagnosis(ctx, h),
		kernelDiagnosis(h),
		builtIn("guest agent", agentbin.Bytes(), "sandboxes cannot boot"),
		builtIn("msb-fetch", fetchbin.Bytes(), "images cannot be pulled or loaded"),
		descriptorDiagnosis(),
	}
	for _, f := range confine.Report() {
		d := diagnosis{Name: "confinement: " + string(f.Measure), Status: statusOK, Detail: "available", Remedy: f.Hint}
		if f.Status != confine.Applied {
			d.Status, d.Detail = statusWeak, f.Detail
		}
		list = append(list, d)
	}
	return list
}

func homeDiagnosis(h home.Dir) diagnosis {
	d := diagnosis{Name: "home", Status: statusOK, Required: true, Detail: string(h)}
	fi, err := os.Stat(string(h))
	foreign := h.Foreign()
	switch {
	case h.Check() != nil:
		d = missing(d, h.Check())
	case foreign != nil:
		d.Status, d.Detail, d.Remedy = statusMissing, foreign.Error(), "set "+home.EnvVar+" to a directory of yours"
	case errors.Is(err, os.ErrNotExist):
		d.Detail += " (will be made)"
	case err != nil:
		d.Status, d.Detail, d.Remedy = statusMissing, err.Error(), "set "+home.EnvVar+" to a directory of yours"
	case unix.Access(string(h), unix.W_OK) != nil:
		d.Status, d.Detail, d.Remedy = statusMissing, string(h)+" cannot be written", "make it writable, or set "+home.EnvVar
	case fi.Mode().Perm()&0o077 != 0:
		d.Status, d.Detail, d.Remedy = statusWeak, fmt.Sprintf("%s has mode %04o: others can look into volumes", h, fi.Mode().Perm()), "chmod 700 "+string(h)
	}
	return d
}

// volumesDiagnosis looks for what killed programs left and for directories that
// belong to no volume.
func volumesDiagnosis(ctx context.Context) diagnosis {
	d := diagnosis{Name: "volumes", Status: statusOK, Detail: "nothing left over, no strangers"}
	found, err := microsandbox.CheckVolumes(ctx)
	if err != nil {
		d.Status, d.Detail = statusWeak, "not looked at: "+err.Error()
		return d
	}
	count := map[string]int{}
	for _, f := range found {
		count[f.Kind]++
	}
	if len(count) == 0 {
		return d
	}
	kinds := make([]string, 0, len(count))
	for _, kind := range slices.Sorted(maps.Keys(count)) {
		kinds = append(kinds, fmt.Sprintf("%d %s", count[kind], kind))
	}
	d.Status, d.Detail = statusWeak, strings.Join(kinds, ", ")
	d.Remedy = "msb volume repair mends what is ours to mend and says of the rest what to do; what belongs to no volume is never touched"
	return d
}

// xattrDiagnosis tries what stat virtualization "strict" needs.
func xattrDiagnosis(h home.Dir) diagnosis {
	d := diagnosis{Name: "user xattrs", Status: statusOK, Detail: "stat-virt=strict works for volumes"}
	dir := string(h)
	if _, err := os.Stat(dir); err != nil {
		d.Detail = "not looked at: there is no home yet"
		return d
	}
	f, err := os.CreateTemp(dir, ".xattr-*")
	if err != nil {
		d.Detail = "not looked at: " + err.Error()
		return d
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := unix.Fsetxattr(int(f.Fd()), "user.msb._probe", []byte{1}, 0); err != nil {
		d.Status, d.Detail = statusWeak, "the home's file system has no user xattrs: "+err.Error()
		d.Remedy = "mount volumes with stat-virt=relaxed or off, or put the home on ext4, XFS, btrfs (tmpfs: Linux 6.6)"
	}
	return d
}

func toolDiagnosis(name, purpose, remedy string, required bool) diagnosis {
	d := diagnosis{Name: name, Status: statusOK, Required: required}
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(p); err == nil {
			d.Detail = found
			return d
		}
	}
	d.Status, d.Detail, d.Remedy = statusMissing, "needed for "+purpose, remedy
	return d
}

func qemuDiagnosis() diagnosis {
	d := diagnosis{Name: "QEMU", Status: statusOK, Required: true}
	path, _, err := qemu.Find()
	if err != nil {
		return missing(d, err)
	}
	v, err := qemu.Version(path)
	if err != nil {
		return missing(d, err)
	}
	d.Detail = path + " " + v
	return d
}

func accelDiagnosis(ctx context.Context, h home.Dir) diagnosis {
	dir := h.Kernels()
	if _, err := os.Stat(dir); err != nil {
		dir = ""
	}
	p := qemu.ProbeKVM(ctx, dir)
	if p.Usable {
		return diagnosis{Name: "accelerator", Status: statusOK, Detail: "KVM: " + p.Reason}
	}
	return diagnosis{
		Name: "accelerator", Status: statusSlow, Detail: "KVM cannot run a guest (" + p.Reason + "); TCG is used",
		Remedy: "guests run under emulation, many times slower than the host; KVM needs hardware virtualization and access to /dev/kvm",
	}
}

func kernelDiagnosis(h home.Dir) diagnosis {
	d := diagnosis{Name: "guest kernel", Status: statusOK, Required: true}
	k, err := kernel.Find(h, agentbin.Bytes())
	if err != nil {
		return missing(d, err)
	}
	d.Detail = fmt.Sprintf("%s (%s)", k.Release, filepath.Dir(k.Image))
	if !k.Own {
		d.Status = statusSlow
		d.Remedy = "a distribution's kernel boots about three times slower than our own: make kernel builds it"
	}
	return d
}

// builtIn looks at a program that the build puts into msb.
func builtIn(name string, program []byte, without string) diagnosis {
	d := diagnosis{Name: name, Status: statusOK, Required: true, Detail: "built in"}
	if program == nil {
		d.Status, d.Detail, d.Remedy = statusMissing, "this msb was built without it: "+without, "build with make build"
	}
	return d
}

func descriptorDiagnosis() diagnosis {
	d := diagnosis{Name: "open files", Status: statusOK}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		d.Status, d.Detail = statusWeak, err.Error()
		return d
	}
	d.Detail = fmt.Sprintf("hard limit %d", l.Max)
	if l.Max < 16384 {
		d.Status = statusWeak
		d.Remedy = "a file server keeps one descriptor for each file its guest knows: raise the hard limit (ulimit -Hn)"
	}
	return d
}

func missing(d diagnosis, err error) diagnosis {
	d.Status, d.Detail = statusMissing, err.Error()
	var e *errdefs.Error
	if errors.As(err, &e) {
		d.Remedy = e.Hint
	}
	return d
}
