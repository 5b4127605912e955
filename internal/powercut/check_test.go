package powercut

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/microsandbox-go/microsandbox"
)

// judge looks at homes after power cuts with the real code.
type judge struct {
	plan plan
	all  bool   // make and remove every name, not only those that were busy
	fsck string // e2fsck; "" leaves disk images alone
}

// verdict collects what is wrong with one home.
type verdict struct{ faults []string }

func (v *verdict) addf(format string, args ...any) {
	v.faults = append(v.faults, fmt.Sprintf(format, args...))
}

// home judges the home at a path, on a disk that was cut when acked steps had
// been acknowledged. It changes the home.
func (j *judge) home(path string, before world, next *step) []string {
	v := &verdict{}
	worlds := []world{before}
	if next != nil {
		worlds = before.during(*next)
	}
	b, err := microsandbox.NewLocalBackend(path)
	if err != nil {
		return []string{err.Error()}
	}
	defer b.Close()
	h := &inspection{judge: j, verdict: v, ctx: context.Background(), path: path, b: b}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && len(before.volumes) > 0 {
		v.addf("there is no home")
		return v.faults
	}
	h.look(atOnce, worlds)
	// The first change settles what the cut left; what is there stays.
	if h.createRemove("probe") {
		h.look("after a change", worlds)
	}
	for _, name := range j.names(before, next) {
		h.use(name, worlds)
	}
	h.repair(worlds)
	return v.faults
}

// names lists the names to make and remove.
func (j *judge) names(before world, next *step) []string {
	if j.all {
		return volumeNames
	}
	var out []string
	if next != nil && next.kind == "prune" {
		return slices.Sorted(maps.Keys(before.volumes))
	}
	if next != nil {
		out = append(out, next.name)
		if next.to != "" {
			out = append(out, next.to)
		}
	}
	return out
}

// inspection is one home being looked at.
type inspection struct {
	*judge
	*verdict
	ctx  context.Context
	path string
	b    *microsandbox.LocalBackend
}

// look compares what is listed with what may be, and reads every file.
func (h *inspection) look(when string, worlds []world) {
	list, err := h.b.ListVolumes(h.ctx)
	if err != nil {
		h.addf("%s: list: %v", when, err)
		return
	}
	found := world{map[string]*volume{}, nil}
	for _, v := range list {
		labels := v.Labels()
		made, _ := strconv.Atoi(labels["made"])
		tag, _ := strconv.Atoi(labels["tag"])
		found.volumes[v.Name()] = &volume{made: made, tag: tag, group: labels["group"], disk: v.Kind() == microsandbox.VolumeKindDisk}
	}
	i := slices.IndexFunc(worlds, func(w world) bool { return w.text() == found.text() })
	if i < 0 {
		var may []string
		for _, w := range worlds {
			may = append(may, w.text())
		}
		h.addf("%s: the home has %s; it may have %s", when, found.text(), strings.Join(may, ", or "))
		return
	}
	for _, v := range list {
		_, err := os.Stat(filepath.Join(h.path, "volumes", v.Name()))
		if err != nil && (when != atOnce || same(worlds, v.Name())) {
			h.addf("%s: %v", when, err) // of one that is being made nobody was told yet
		}
		if v.Kind() != microsandbox.VolumeKindDisk {
			h.files(when, v, worlds[i].volumes[v.Name()])
		} else if err == nil {
			h.disk(when, v)
		}
	}
}

// atOnce is before any change.
const atOnce = "at once"

// same tells whether all worlds have the same volume of a name.
func same(worlds []world, name string) bool {
	for _, w := range worlds {
		if v := w.volumes[name]; v == nil || v.made != worlds[0].volumes[name].made {
			return false
		}
	}
	return true
}

// text names what a list shows of a world.
func (w world) text() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(w.volumes)) {
		v := w.volumes[name]
		out = append(out, fmt.Sprintf("%s(made %d tag %d %s disk %t)", name, v.made, v.tag, v.group, v.disk))
	}
	return "[" + strings.Join(out, " ") + "]"
}

// files reads every file of a volume: each is what was acknowledged, or old or
// new, and there are no others.
func (h *inspection) files(when string, v *microsandbox.VolumeHandle, want *volume) {
	fs := v.FS()
	found := map[string]int{}
	if err := h.walk(fs, "", found); err != nil {
		h.addf("%s: list files of %s: %v", when, v.Name(), err)
		return
	}
	for path := range found {
		f := want.files[path]
		if f == nil || len(f.may) == 1 && f.may[0] {
			h.addf("%s: %s has a file %q that nobody should see", when, v.Name(), path)
			continue
		}
		b, err := fs.Read(h.ctx, path)
		if err != nil {
			h.addf("%s: read %s:%s: %v", when, v.Name(), path, err)
			continue
		}
		n, ok := h.plan.numberOf(b, f.may)
		if !ok {
			h.addf("%s: %s:%s is %s; it may be of step %v", when, v.Name(), path, h.plan.describe(b), slices.Sorted(maps.Keys(f.may)))
		}
		found[path] = n
	}
	for path, f := range want.files {
		if _, ok := found[path]; !ok && !f.may[0] {
			h.addf("%s: %s:%s is gone; it may be of step %v", when, v.Name(), path, slices.Sorted(maps.Keys(f.may)))
		}
	}
	for _, m := range want.moves {
		if found[m.paths[0]] != m.content && found[m.paths[1]] != m.content {
			h.addf("%s: %s: the file of step %d, renamed from %s to %s, is under neither name", when, v.Name(), m.content, m.paths[0], m.paths[1])
		}
	}
}

func (h *inspection) walk(fs *microsandbox.VolumeFs, dir string, found map[string]int) error {
	list, err := fs.List(h.ctx, dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		path := strings.TrimPrefix(e.Path, "/")
		if e.Kind != microsandbox.FsEntryKindDirectory {
			found[path] = 0
		} else if err := h.walk(fs, path, found); err != nil {
			return err
		}
	}
	return nil
}

// disk checks the image of a disk volume.
func (h *inspection) disk(when string, v *microsandbox.VolumeHandle) {
	if h.fsck == "" {
		return
	}
	image := filepath.Join(h.path, "volumes", v.Name(), "disk.raw")
	if out, err := runBound(exec.Command(h.fsck, "-fn", image)); err != nil {
		h.addf("%s: e2fsck of %s: %v: %s", when, v.Name(), err, out)
	}
}

func (h *inspection) createRemove(name string) bool {
	if _, err := h.b.CreateVolume(h.ctx, microsandbox.VolumeSpec{Name: name}); err != nil {
		h.addf("create %s: %v", name, err)
		return false
	}
	if err := h.b.RemoveVolume(h.ctx, name); err != nil {
		h.addf("remove %s: %v", name, err)
		return false
	}
	return true
}

// use makes and removes a name, whatever the cut left at it.
func (h *inspection) use(name string, worlds []world) {
	_, err := h.b.GetVolume(h.ctx, name)
	if errors.Is(err, microsandbox.ErrVolumeNotFound) {
		stranger := slices.ContainsFunc(worlds, func(w world) bool { return w.strangers[name] })
		if _, err := os.Lstat(filepath.Join(h.path, "volumes", name)); err != nil || !stranger {
			h.createRemove(name)
			return
		}
		if _, err := h.b.AdoptVolume(h.ctx, name, microsandbox.VolumeAdoptOptions{}); err != nil {
			h.addf("adopt %s: %v", name, err)
			return
		}
	} else if err != nil {
		h.addf("get %s: %v", name, err)
		return
	}
	if err := h.b.RemoveVolume(h.ctx, name); err != nil {
		h.addf("remove %s: %v", name, err)
		return
	}
	h.createRemove(name)
}

// repair demands that a repair finds nothing that it cannot mend, and leaves
// nothing.
func (h *inspection) repair(worlds []world) {
	found, err := h.b.RepairVolumes(h.ctx)
	if err != nil {
		h.addf("repair: %v", err)
	}
	left, err := h.b.CheckVolumes(h.ctx)
	if err != nil {
		h.addf("check: %v", err)
	}
	for _, f := range append(found, left...) {
		stranger := f.Kind == "stranger" && slices.ContainsFunc(worlds, func(w world) bool { return w.strangers[f.Name] })
		if !f.Done() && !stranger {
			h.addf("repair leaves: %s %s %s %s", f.Kind, f.Name, f.ID, f.Detail)
		}
	}
}
