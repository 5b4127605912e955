package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// usageJSON is a volume in `msb volume usage --format json`; null is "none", or
// "not looked for".
type usageJSON struct {
	AllocatedBytes *uint64 `json:"allocated_bytes"`
	Counted        bool    `json:"counted"` // false: used_bytes is what a walk found
	Exact          bool    `json:"exact"`
	FoundBytes     *uint64 `json:"found_bytes"`
	FoundInodes    *uint64 `json:"found_inodes"`
	Kind           string  `json:"kind"`
	LimitBytes     *uint64 `json:"limit_bytes"`
	LimitInodes    *uint64 `json:"limit_inodes"`
	Matches        bool    `json:"matches"`
	Name           string  `json:"name"`
	OrphanBytes    uint64  `json:"orphan_bytes"`
	OrphanInodes   uint64  `json:"orphan_inodes"`
	PendingBytes   uint64  `json:"pending_bytes"`
	UsedBytes      uint64  `json:"used_bytes"`
	UsedInodes     uint64  `json:"used_inodes"`
	Writers        int     `json:"writers"`
}

type volumeUsageOptions struct {
	verify, rescan bool
	format         outputFormat
}

func newVolumeUsageCmd() *cobra.Command {
	var o volumeUsageOptions
	cmd := &cobra.Command{
		Use:   "usage [NAME]",
		Short: "Show what volumes hold and may hold",
		Long: `Show what a volume, or every volume, holds: bytes and files as they are charged and
limited, bytes that they take on the host, and how many sandboxes and programs may
change it now. It looks at every file.

STATE is "exact"; "at most" while somebody writes, who may have 1 MiB in reserve;
"not counted" where there is no count, or a damaged one, and what was found is shown.

--verify compares what it finds with what was counted, and fails if they differ or
nothing was counted; --rescan takes what it finds for what the volume holds, after a
program has written to the directory itself.`,
		Example: `  msb volume usage
  msb volume usage cache --verify`,
		Args:              args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeVolumes(false),
		RunE:              func(cmd *cobra.Command, args []string) error { return runVolumeUsage(cmd, o, args) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.verify, "verify", false, "compare with what is there")
	f.BoolVar(&o.rescan, "rescan", false, "count anew")
	formatFlag(cmd, &o.format)
	return cmd
}

func runVolumeUsage(cmd *cobra.Command, o volumeUsageOptions, args []string) error {
	if o.verify && o.rescan {
		return usagef("--verify and --rescan exclude each other: one compares, the other counts anew")
	}
	handles, err := usageHandles(cmd.Context(), args)
	if err != nil {
		return err
	}
	found := make([]usageJSON, 0, len(handles))
	var failed error // of one volume; the others are shown
	for _, h := range handles {
		u, err := o.measure(cmd.Context(), h)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		if !u.Matches() {
			failed = errors.Join(failed, usageDiffers(h.Name(), u))
		} else if u.Uncounted {
			warnOfMissingCount(cmd.ErrOrStderr(), h.Name(), u)
		}
		found = append(found, describeUsage(h, u))
	}
	if len(found) == 0 && failed != nil {
		return failed
	}
	out := cmd.OutOrStdout()
	switch {
	case o.format != formatJSON:
		err = printUsage(out, found, o.verify)
	case len(args) == 1:
		err = printJSON(out, found[0])
	default:
		err = printJSON(out, found)
	}
	return errors.Join(err, failed)
}

func warnOfMissingCount(w io.Writer, name string, u *microsandbox.VolumeUsage) {
	fmt.Fprintf(w, "msb: %s\nmsb: hint: %s\n", missingCount(name, u), hintRescan(name))
}

func missingCount(name string, u *microsandbox.VolumeUsage) string {
	if u.Damaged {
		return fmt.Sprintf("volume %q: what was counted cannot be read: its ledger is damaged", name)
	}
	return fmt.Sprintf("volume %q is not counted yet", name)
}

func hintRescan(name string) string {
	return fmt.Sprintf("its next writer counts it, or: msb volume usage %s --rescan", name)
}

func usageHandles(ctx context.Context, args []string) ([]*microsandbox.VolumeHandle, error) {
	if len(args) == 0 {
		return microsandbox.ListVolumes(ctx)
	}
	h, err := microsandbox.GetVolume(ctx, args[0])
	return []*microsandbox.VolumeHandle{h}, err
}

func (o volumeUsageOptions) measure(ctx context.Context, h *microsandbox.VolumeHandle) (*microsandbox.VolumeUsage, error) {
	switch {
	case o.rescan:
		return h.RescanUsage(ctx)
	case o.verify:
		return h.VerifyUsage(ctx)
	}
	return h.AllocatedUsage(ctx)
}

func usageDiffers(name string, u *microsandbox.VolumeUsage) error {
	if u.Uncounted {
		return &microsandbox.Error{Kind: microsandbox.ErrFilesystem, Message: missingCount(name, u), Hint: hintRescan(name)}
	}
	return &microsandbox.Error{
		Kind: microsandbox.ErrFilesystem,
		Message: fmt.Sprintf("volume %q is counted as %d bytes, %d files; found were %d bytes, %d files",
			name, u.UsedBytes, u.UsedInodes, *u.FoundBytes+u.OrphanBytes, *u.FoundInodes+u.OrphanInodes),
		Hint: fmt.Sprintf("if a program wrote to its directory itself: msb volume usage %s --rescan", name),
	}
}

func describeUsage(h *microsandbox.VolumeHandle, u *microsandbox.VolumeUsage) usageJSON {
	return usageJSON{
		AllocatedBytes: u.AllocatedBytes, Counted: !u.Uncounted, Exact: u.Exact, FoundBytes: u.FoundBytes, FoundInodes: u.FoundInodes,
		Kind: string(h.Kind()), LimitBytes: u.LimitBytes, LimitInodes: u.LimitInodes, Matches: u.Matches(), Name: h.Name(),
		OrphanBytes: u.OrphanBytes, OrphanInodes: u.OrphanInodes, PendingBytes: u.PendingBytes, UsedBytes: u.UsedBytes, UsedInodes: u.UsedInodes, Writers: u.Writers,
	}
}

func printUsage(w io.Writer, found []usageJSON, verified bool) error {
	t := newTable(w, "NAME", "USED", "LIMIT", "FILES", "LIMIT", "ALLOCATED", "WRITERS", "STATE")
	for i := range found {
		u := &found[i]
		t.row(u.Name, formatBytes(u.UsedBytes), limitOrDash(u.LimitBytes), u.files(), numberOrDash(u.LimitInodes),
			bytesOrDash(u.AllocatedBytes), strconv.Itoa(u.Writers), u.state(verified))
	}
	return t.flush()
}

func (u *usageJSON) files() string {
	if u.Kind == string(microsandbox.VolumeKindDisk) {
		return "-"
	}
	return strconv.FormatUint(u.UsedInodes, 10)
}

func (u *usageJSON) state(verified bool) string {
	switch {
	case !u.Counted:
		return "not counted"
	case !u.Matches:
		return fmt.Sprintf("found %s, %d", formatBytes(*u.FoundBytes+u.OrphanBytes), *u.FoundInodes+u.OrphanInodes)
	case !u.Exact:
		return "at most"
	case verified:
		return "verified"
	}
	return "exact"
}

func bytesOrDash(n *uint64) string {
	if n == nil {
		return "-"
	}
	return formatBytes(*n)
}

func limitOrDash(n *uint64) string {
	if n == nil {
		return "-"
	}
	return formatLimit(*n)
}

func numberOrDash(n *uint64) string {
	if n == nil {
		return "-"
	}
	return strconv.FormatUint(*n, 10)
}

func newVolumeSetQuotaCmd() *cobra.Command {
	var inodes string
	cmd := &cobra.Command{
		Use:   "set-quota NAME [SIZE|none]",
		Short: "Change the limits of a directory volume",
		Long: `Change the limits of a directory volume, attached or not, and print the limits that
it has then. A limit below what the volume holds refuses growth and nothing else.

Without --inodes the limit of files goes with the quota: one per 4 KiB, at least
1024. Each directory, and each further name of a file, counts as one.`,
		Example: `  msb volume set-quota cache 2G
  msb volume set-quota cache none --inodes 100000`,
		Args:              args(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			limits, err := parseLimits(args[1:], inodes)
			if err != nil {
				return err
			}
			if limits == (microsandbox.VolumeLimits{}) {
				return usagef("nothing to change; usage: %s", cmd.UseLine())
			}
			return runVolumeSetQuota(cmd, args[0], limits)
		},
	}
	cmd.Flags().StringVar(&inodes, "inodes", "", `limit of files, or "default"`)
	return cmd
}

func parseLimits(size []string, inodes string) (l microsandbox.VolumeLimits, err error) {
	if len(size) == 1 {
		var quota uint32
		if size[0] != "none" {
			if quota, err = parseMiB(size[0]); err != nil {
				return l, usagef("%v, or none", err)
			}
			if quota == 0 {
				return l, usagef(`0 is not a quota; for no limit say "none"`)
			}
		}
		l.QuotaMiB = &quota
	}
	if inodes != "" {
		var n inodesFlag
		if inodes != "default" {
			if err := n.Set(inodes); err != nil {
				return l, usagef("%v, or default", err)
			}
		}
		l.Inodes = (*uint64)(&n)
	}
	return l, nil
}

func runVolumeSetQuota(cmd *cobra.Command, name string, limits microsandbox.VolumeLimits) error {
	h, err := microsandbox.GetVolume(cmd.Context(), name)
	if err != nil {
		return err
	}
	if h, err = h.SetQuota(cmd.Context(), limits); err != nil {
		return err
	}
	u, err := h.Usage(cmd.Context())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s, %s files\n", orUnlimited(limitOrDash(u.LimitBytes)), orUnlimited(numberOrDash(u.LimitInodes)))
	return err
}

func orUnlimited(s string) string {
	if s == "-" {
		return "unlimited"
	}
	return s
}

// inodesFlag is a number of files, at least one.
type inodesFlag uint64

func (n *inodesFlag) String() string { return "" }
func (n *inodesFlag) Type() string   { return "N" }

func (n *inodesFlag) Set(s string) error {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v == 0 || v > volstore.MaxInodes {
		return fmt.Errorf("%q is not a number of files: 1 to %d", s, uint64(volstore.MaxInodes))
	}
	*n = inodesFlag(v)
	return nil
}

// countProcess is the first argument of a process that counts what a large volume
// holds.
const countProcess = "count-volume"

// startCounter starts the process and does not wait for it, as startReaper.
func startCounter(homeDir, id string) error {
	cmd := exec.Command("/proc/self/exe", countProcess, id)
	cmd.Args[0] = "msb"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), home.EnvVar+"="+homeDir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// countMain counts a volume of $MSB_HOME, at low priority. A killed one leaves it
// to the next writer.
func countMain(args []string) int {
	runtime.LockOSThread() // on Linux a priority belongs to a thread
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	h, err := home.Resolve()
	if err == nil && len(args) == 1 {
		_, err = volstore.New(h).Recount(ctx, args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "msb: error:", err)
		return exitFailure
	}
	return exitOK
}
