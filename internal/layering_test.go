package internal

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/microsandbox-go/microsandbox"

// forbidden lists arrows that may not be drawn, not even through others, and
// why. A name ending in /... stands for a package and everything below it; "" is
// the root package.
var forbidden = []struct{ from, to, why string }{
	{"internal/...", "", "the root package is on top: it converts what internal packages return"},
	{"internal/...", "cmd/...", "commands are on top"},
	{"", "cmd/...", "commands are on top"},
	{"", "internal/server", "programs that import the library do not link the server's libraries"},
	{"", "internal/guest", "the guest agent is a program of its own"},
	{"cmd/msb", "internal/guest", "the guest agent is a program of its own; msb embeds its binary"},
	{"", "internal/fetch/fetcher", "programs that import the library link no TLS and no zstd: msb-fetch does"},
	{"cmd/msb", "internal/fetch/fetcher", "a third of every start: msb-fetch is a program of its own"},
	{"internal/vhostuser", "internal/fusewire", "the transport knows no FUSE"},
	{"internal/vhostuser/frontend", "internal/fusewire", "the transport knows no FUSE"},
	{"internal/vhostuser/...", "internal/fuseserver", "the transport knows no FUSE"},
	{"internal/fuseserver", "internal/volstore", "the file server knows directories, not volumes: it is confined and has no records"},
	{"internal/fileserver", "internal/volstore", "the file server knows directories, not volumes: it is confined and has no records"},
	{"internal/fileserver", "internal/records", "the file server is confined and has no records"},
	{"internal/volumefs", "internal/volstore", "file access knows an open directory; who owns it is joined in the root package"},
	{"internal/volumefs", "internal/records", "file access knows an open directory; who owns it is joined in the root package"},
	{"internal/volstore", "internal/volumefs", "the store never follows a path inside a volume"},
	{"internal/volstore", "internal/supervisor", "the store knows locks, not who holds them"},
	{"internal/volstore", "internal/mount", "mounts use volumes, not the other way round"},
	{"internal/records", "internal/volstore", "records know rows, not directories"},
	{"internal/diskimg", "internal/volstore", "images are below volumes"},
	{"internal/mount", "internal/supervisor", "a plan is made before there is anybody to carry it out"},
	{"internal/mount", "internal/vmm/qemu", "a plan names devices, not QEMU's options"},
	{"internal/vmm/...", "internal/mount", "a machine gets devices and does not know why"},
	{"internal/vmm/...", "internal/supervisor", "a machine is watched by its supervisor, not the other way round"},
	{"internal/image", "internal/supervisor", "images are below sandboxes"},
	{"internal/agentclient", "internal/guest", "the two ends share agentproto and nothing else"},
}

// onlyUses lists packages that may use nothing of this module but what is named.
var onlyUses = []struct {
	pkg     string
	allowed []string
	why     string
}{
	{"internal/errdefs", nil, "a leaf"},
	{"internal/failpoint", nil, "a leaf"},
	{"internal/home", []string{"internal/errdefs"}, "nearly a leaf"},
	{"internal/version", nil, "a leaf"},
	{"internal/mountinfo", nil, "a leaf"},
	{"internal/fusewire", nil, "wire formats use the standard library only"},
	{"internal/image/ext4", nil, "a format, which knows no images"},
	{"internal/agentproto", []string{"internal/errdefs"}, "wire formats use the standard library and the CBOR library only"},
	{"internal/guest", []string{"internal/agentproto", "internal/errdefs", "internal/failpoint", "internal/mountinfo", "internal/version"}, "the guest agent contains no host code"},
	{"internal/volumefs", []string{"internal/errdefs", "internal/failpoint", "internal/ledger"}, "file access knows an open directory"},
	{"internal/ledger", []string{"internal/errdefs", "internal/failpoint"}, "the ledger is shared by confined file servers and host programs"},
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// TestLayering: arrows between packages point down only.
func TestLayering(t *testing.T) {
	packages := listPackages(t)
	for _, p := range packages {
		name, ours := within(p.ImportPath)
		if !ours {
			continue
		}
		for _, f := range forbidden {
			if !matches(f.from, name) || matches(f.to, name) {
				continue
			}
			for _, dep := range p.Deps {
				if to, ours := within(dep); ours && matches(f.to, to) {
					t.Errorf("%s uses %s: %s", shown(name), shown(to), f.why)
				}
			}
		}
		for _, o := range onlyUses {
			if o.pkg != name {
				continue
			}
			for _, dep := range p.Deps {
				if to, ours := within(dep); ours && !slices.Contains(o.allowed, to) {
					t.Errorf("%s uses %s: %s", name, to, o.why)
				}
			}
		}
	}
}

// TestStartIsLight: packages whose initialization and size a short command would
// pay for are msb-fetch's.
func TestStartIsLight(t *testing.T) {
	heavy := []string{"net/http", "crypto/tls", "github.com/klauspost/compress/zstd", "github.com/google/go-containerregistry/pkg/name"}
	for _, p := range listPackages(t) {
		if p.ImportPath != module+"/cmd/msb" {
			continue
		}
		for _, dep := range heavy {
			if slices.Contains(p.Deps, dep) {
				t.Errorf("msb uses %s", dep)
			}
		}
	}
}

// TestFusewireStandardLibraryOnly: dotless first elements are the standard library's.
func TestFusewireStandardLibraryOnly(t *testing.T) {
	for _, p := range listPackages(t) {
		if p.ImportPath != module+"/internal/fusewire" {
			continue
		}
		for _, dep := range p.Imports {
			if first, _, _ := strings.Cut(dep, "/"); strings.Contains(first, ".") {
				t.Errorf("fusewire imports %s: it uses the standard library only", dep)
			}
		}
	}
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Imports,Deps", module+"/...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var list []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := dec.Decode(&p)
		if err == io.EOF {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

// within cuts the module's path off; "" is the root package.
func within(importPath string) (string, bool) {
	if importPath == module {
		return "", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

func matches(pattern, name string) bool {
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == base || strings.HasPrefix(name, base+"/")
	}
	return name == pattern
}

func shown(name string) string {
	if name == "" {
		return "the root package"
	}
	return name
}
