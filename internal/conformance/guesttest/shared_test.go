package guesttest

import (
	"fmt"
	"strconv"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/conformance"
)

// party reads the arguments ME PARTIES DIR EXACT BOUND HOST.
func party(args []string) (*conformance.Party, error) {
	if len(args) < 6 {
		return nil, fmt.Errorf("%d arguments", len(args))
	}
	var n [3]int
	for i, at := range []int{0, 1, 5} {
		v, err := strconv.Atoi(args[at])
		if err != nil {
			return nil, err
		}
		n[i] = v
	}
	bound, err := time.ParseDuration(args[4])
	return &conformance.Party{Me: n[0], Parties: n[1], Dir: args[2], Exact: args[3], Bound: bound, Host: n[2]}, err
}

// exchange PARTY ROUNDS takes part in an exchange and prints, by property, how
// many reads were old, of how many, and for how long.
func exchange(args []string) error {
	p, err := party(args)
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(args[6])
	if err != nil {
		return err
	}
	seen, err := p.Exchange(rounds)
	for _, s := range seen {
		fmt.Println(s)
	}
	return err
}

// appends PARTY RECORDS appends together with others.
func appends(args []string) error {
	p, err := party(args)
	if err != nil {
		return err
	}
	records, err := strconv.Atoi(args[6])
	if err != nil {
		return err
	}
	return p.Append(records)
}

// mappings DIR SHARED checks mappings of files and programs in a directory;
// SHARED says whether shared ones must work.
func mappings(args []string) error {
	shared, err := strconv.ParseBool(args[1])
	if err != nil {
		return err
	}
	return conformance.CheckMappings(args[0], shared, []string{"-test.list=^TestFsx$"}, "TestFsx\n")
}
