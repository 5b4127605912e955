package main

import (
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	const doc = "a\n<!-- bench:x:begin -->\nold\n<!-- bench:x:end -->\nb\n<!-- bench:y:begin -->\n<!-- bench:y:end -->\n"
	if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replace(path, "x", "new\n\n"); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	if want := strings.Replace(doc, "old", "new", 1); string(b) != want {
		t.Errorf("got %q, want %q", b, want)
	}
	if err := replace(path, "z", "new"); err == nil {
		t.Error("replaced what has no markers")
	}
}

func TestMissed(t *testing.T) {
	reasons["test"] = map[string]string{"slow": "because."}
	defer delete(reasons, "test")
	got := section{name: "test"}.missed("| row | must | |\n|---|---|---|\n| fast | 1 | ok |\n| slow | 1 | miss |\n| slow | 2 | miss |\n| new | 1 | miss |\n| far | 1 missed | ok |\n")
	want := "\nMissed, and why:\n\n- slow: because.\n- new: not looked into yet.\n\nMoonshots missed, and why:\n\n- far: not looked into yet.\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestChart(t *testing.T) {
	rows := []charted{
		{Name: "as fast <&>", Unit: "ms", Must: 0.5, Peer: []float64{2, 2, 2}, Ours: []float64{2, 2, 2}},
		{Name: "twice", Unit: "MiB/s", Must: 1.5, Peer: []float64{1}, Ours: []float64{2}},
		{Name: "far out", Unit: "µs", Peer: []float64{1000}, Ours: []float64{1}},
	}
	svg := volumesChart.svg(rows)
	for _, want := range []string{"<title", "<desc", "prefers-color-scheme: dark", "as fast &lt;&amp;&gt;", "1.00x", "0.50x", "0.001x"} {
		if !strings.Contains(svg, want) {
			t.Errorf("the chart has no %q", want)
		}
	}
	d := xml.NewDecoder(strings.NewReader(svg))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
