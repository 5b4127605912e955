package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// sandboxDetail is a sandbox in msb inspect --format json.
type sandboxDetail struct {
	Name      string                     `json:"name"`
	Status    microsandbox.SandboxStatus `json:"status"`
	Cause     string                     `json:"cause"`
	Config    json.RawMessage            `json:"config"`
	CreatedAt *string                    `json:"created_at"`
	UpdatedAt *string                    `json:"updated_at"`
}

func newInspectCmd() *cobra.Command {
	var format outputFormat
	cmd := &cobra.Command{
		Use:   "inspect NAME",
		Short: "Show a sandbox's state; as JSON also its definition",
		Args:  args(cobra.ExactArgs(1)), ValidArgsFunction: completeSandboxes(false),
		RunE: func(cmd *cobra.Command, names []string) error {
			h, err := microsandbox.GetSandbox(cmd.Context(), names[0])
			if err != nil {
				return err
			}
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), sandboxDetail{
					Name: h.Name(), Status: h.Status(), Cause: h.Cause(), Config: json.RawMessage(h.ConfigJSON()),
					CreatedAt: jsonTime(h.CreatedAt()), UpdatedAt: jsonTime(h.UpdatedAt()),
				})
			}
			return printSandbox(cmd.OutOrStdout(), h)
		},
	}
	formatFlag(cmd, &format)
	return cmd
}

// printSandbox writes one field a line, the name of the field 16 columns wide.
func printSandbox(w io.Writer, h *microsandbox.SandboxHandle) error {
	fields := [][2]string{{"Name", h.Name()}, {"Status", string(h.Status())}}
	if h.Cause() != "" {
		fields = append(fields, [2]string{"Cause", h.Cause()})
	}
	fields = append(fields, [][2]string{{"Image", h.Image()}, {"Created", formatTime(h.CreatedAt())}, {"Updated", formatTime(h.UpdatedAt())}}...)
	labels := h.Labels()
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		fields = append(fields, [2]string{"Label", k + "=" + labels[k]})
	}
	for _, m := range mountLines(h.ConfigJSON()) {
		fields = append(fields, [2]string{"Mount", m})
	}
	for _, f := range fields {
		if _, err := fmt.Fprintf(w, "%-16s%s\n", f[0], printable(f[1])); err != nil {
			return err
		}
	}
	return nil
}

// mountLines describes the mounts of a definition: GUEST, SOURCE and options.
func mountLines(config string) []string {
	var c struct {
		Mounts []mount.Spec `json:"mounts"`
	}
	if json.Unmarshal([]byte(config), &c) != nil {
		return nil
	}
	var lines []string
	for _, m := range c.Mounts {
		lines = append(lines, mountLine(m))
	}
	return lines
}

func mountLine(m mount.Spec) string {
	source := m.Source
	switch m.Kind {
	case mount.KindNamed:
		source = "volume " + source
	case mount.KindTmpfs:
		source = "tmpfs"
	case mount.KindDisk:
		source = "disk " + source
	}
	options := []string{"rw"}
	if m.Readonly {
		options[0] = "ro"
	}
	for _, o := range []struct {
		name string
		set  bool
	}{{"noexec", m.Noexec}, {"nosuid", m.Nosuid}, {"nodev", m.Nodev}} {
		if o.set {
			options = append(options, o.name)
		}
	}
	for _, o := range []struct{ name, value string }{{"stat-virt", m.StatVirt}, {"host-perms", m.HostPerms}, {"cache", m.Cache}, {"fstype", m.Fstype}} {
		if o.value != "" {
			options = append(options, o.name+"="+o.value)
		}
	}
	return fmt.Sprintf("%s from %s (%s)", m.Guest, source, strings.Join(options, ","))
}
