package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

//go:generate env UPDATE_DOCS=1 go test -count=1 -run ^TestCommandsDocumented$ .

// jsonOutputs is what each command with --format json prints: a value of the
// type, or a list of such values.
var jsonOutputs = map[string]any{
	"msb ls":             []sandboxRow{},
	"msb inspect":        sandboxDetail{},
	"msb image list":     []imageRow{},
	"msb image inspect":  imageDetail{},
	"msb image prune":    imagePruneRow{},
	"msb kernel ls":      []kernelRow{},
	"msb doctor":         []diagnosis{},
	"msb version":        versionInfo{},
	"msb volume ls":      []volumeJSON{},
	"msb volume inspect": volumeDetails{},
	"msb volume label":   map[string]string{},
	"msb volume prune":   []prunedJSON{},
	"msb volume repair":  []findingJSON{},
	"msb volume usage":   usageJSON{},
	"msb volume fs ls":   []entryJSON{},
	"msb volume fs stat": statJSON{},
}

// jsonLists are commands that print one object or many.
var jsonLists = map[string]string{"msb volume usage": "; without NAME a list of such objects"}

const commandsFile = "../../docs/cli.md"

const commandsHead = `# Commands

Written by ` + "`make docs`" + ` from the commands themselves; a test compares it with them.

Results go to standard output, everything else to standard error: progress, ` + "`msb: error: ...`" + ` and
` + "`msb: hint: ...`" + `. Progress is drawn on a terminal; elsewhere
` + "`msb image pull` and `load`" + ` print a line for each phase, other commands nothing. No command prints
colours. Names that others have chosen are printed with control characters escaped. Files are in ` + "`$MSB_HOME`" + `, by default
` + "`~/.microsandbox`" + `.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | failed; of several names, at least one; of ` + "`volume fs exists`" + ` and ` + "`usage --verify`" + `: no |
| 2 | wrong usage: a command line that is wrong whatever there is (a flag, a name, a size that no volume can have); nothing was done |
| 126, 127 | ` + "`run` and `exec`" + `: the program cannot be executed, was not found |
| 130, 143 | ended by Ctrl-C (SIGINT), by SIGTERM |
| any | ` + "`run` and `exec`" + `: the program's own |

Times in JSON are UTC in RFC 3339 with nanoseconds; ` + "`null`" + ` means unknown or none. Fields may be
added, never renamed. Every command has ` + "`-h, --help`" + `. A flag of ` + "`msb volume`" + ` that takes one value is
refused when it is given two.

A SIZE is a whole number of MiB, alone or with M, or a number with G, T or P for 1024, 1024² and 1024³
of them, which may have a fraction: 512, 512M, 1G, 1.5G, 2T. "iB" may follow the unit, as in all sizes that
are printed: 512MiB, 1.5GiB. Limits and sizes of volumes are printed exactly, other sizes with four digits.
`

// TestCommandsDocumented compares docs/cli.md with the commands; with
// UPDATE_DOCS set it writes the file.
func TestCommandsDocumented(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(commandsHead)
	seen := map[string]bool{}
	for _, c := range visibleCommands(newRootCmd()) {
		if err := describeCommand(&b, c); err != nil {
			t.Fatal(err)
		}
		seen[c.CommandPath()] = true
	}
	for path := range jsonOutputs {
		if !seen[path] {
			t.Errorf("jsonOutputs names %q, which is no command", path)
		}
	}
	if os.Getenv("UPDATE_DOCS") != "" {
		if err := os.WriteFile(commandsFile, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(commandsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s differs from the commands: run make docs", commandsFile)
	}
}

// visibleCommands returns the commands that do something, parents before
// children.
func visibleCommands(c *cobra.Command) []*cobra.Command {
	var list []*cobra.Command
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() && sub.Name() != "help" {
			continue
		}
		if !sub.HasSubCommands() {
			list = append(list, sub)
		}
		list = append(list, visibleCommands(sub)...)
	}
	return list
}

func describeCommand(b *bytes.Buffer, c *cobra.Command) error {
	fmt.Fprintf(b, "\n## %s\n\n%s.\n\n    %s\n\n", c.CommandPath(), c.Short, c.UseLine())
	if c.Long != "" {
		fmt.Fprintf(b, "%s\n\n", strings.ReplaceAll(c.Long, "\n  ", "\n    ")) // code
	}
	if len(c.Aliases) > 0 {
		fmt.Fprintf(b, "Also: %s.\n\n", strings.Join(c.Aliases, ", "))
	}
	if c.NonInheritedFlags().HasFlags() {
		b.WriteString("| Flag | Meaning |\n|---|---|\n")
	}
	c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		name, usage := pflag.UnquoteUsage(f)
		flag := "--" + f.Name
		if f.Shorthand != "" {
			flag = "-" + f.Shorthand + ", " + flag
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", escapeCell(strings.TrimSpace(flag+" "+name)), escapeCell(usage))
	})
	if c.Flags().Lookup("format") == nil || c.Name() == "save" {
		return nil
	}
	v, ok := jsonOutputs[c.CommandPath()]
	if !ok {
		return fmt.Errorf("%s has --format; say in jsonOutputs what it prints", c.CommandPath())
	}
	typ := reflect.TypeOf(v)
	switch typ.Kind() {
	case reflect.Map:
		b.WriteString("\nJSON: an object, each key with its value.\n")
		return nil
	case reflect.Slice:
		b.WriteString("\nJSON: a list of objects.\n\n")
		typ = typ.Elem()
	default:
		b.WriteString("\nJSON: an object" + jsonLists[c.CommandPath()] + ".\n\n")
	}
	b.WriteString("| Field | Type |\n|---|---|\n")
	describeFields(b, "", typ)
	return nil
}

func escapeCell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func describeFields(b *bytes.Buffer, prefix string, typ reflect.Type) {
	for f := range typ.Fields() {
		if f.Anonymous {
			describeFields(b, prefix, f.Type)
			continue
		}
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		text := jsonType(f.Type)
		if strings.Contains(opts, "omitempty") {
			text += ", left out when empty"
		}
		fmt.Fprintf(b, "| `%s%s` | %s |\n", prefix, name, text)
		if s, path := elementOf(f.Type, prefix+name); s.Kind() == reflect.Struct {
			describeFields(b, path+".", s)
		}
	}
}

// elementOf looks through pointers and lists.
func elementOf(t reflect.Type, path string) (reflect.Type, string) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8 {
		if t.Kind() == reflect.Slice {
			path += "[]"
		}
		t = t.Elem()
	}
	return t, path
}

func jsonType(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[json.RawMessage]():
		return "object"
	case t.Kind() == reflect.Pointer:
		return jsonType(t.Elem()) + " or null"
	case t.Kind() == reflect.Slice:
		return "list of " + jsonType(t.Elem())
	case t.Kind() == reflect.String:
		return "string"
	case t.Kind() == reflect.Bool:
		return "boolean"
	case t.Kind() == reflect.Struct, t.Kind() == reflect.Map:
		return "object"
	}
	return "number"
}

// TestJSONOutput runs commands and demands that what they print is exactly the
// documented type: read into it and printed again it is the same.
func TestJSONOutput(t *testing.T) {
	t.Setenv("MSB_HOME", t.TempDir())
	msb := func(args ...string) []byte {
		t.Helper()
		root, out := newRootCmd(), &bytes.Buffer{}
		root.SetArgs(args)
		root.SetOut(out)
		root.SetIn(strings.NewReader("content"))
		if err := root.ExecuteContext(t.Context()); err != nil && !isSilent(err) {
			t.Fatalf("msb %s: %v", strings.Join(args, " "), err)
		}
		return out.Bytes()
	}
	msb("volume", "create", "v", "--label", "team=ml", "--quota", "10M")
	msb("volume", "fs", "write", "v", "dir/file")
	for _, command := range []string{
		"ls", "image list", "image prune --yes", "kernel ls", "doctor", "version", "volume ls", "volume inspect v",
		"volume label v", "volume fs ls v /dir", "volume fs stat v /dir/file", "volume repair",
	} {
		args := strings.Fields(command)
		out := msb(append(args, "--format", "json")...)
		path := "msb"
		for _, a := range args {
			if _, ok := jsonOutputs[path]; !ok {
				path += " " + a
			}
		}
		v := reflect.New(reflect.TypeOf(jsonOutputs[path]))
		d := json.NewDecoder(bytes.NewReader(out))
		d.DisallowUnknownFields()
		if err := d.Decode(v.Interface()); err != nil {
			t.Errorf("%s: %v in\n%s", command, err, out)
			continue
		}
		var again bytes.Buffer
		if err := printJSON(&again, v.Elem().Interface()); err != nil || !bytes.Equal(again.Bytes(), out) {
			t.Errorf("%s prints\n%s, documented is\n%s (%v)", command, out, again.Bytes(), err)
		}
	}
}
