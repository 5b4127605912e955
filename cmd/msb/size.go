package main

import (
	"fmt"
	"math"
	"math/big"
	"strings"
	"time"
)

// durationFlag is a time on the command line: 90 (seconds), 30s, 5m, 1h30m.
type durationFlag time.Duration

func (d *durationFlag) String() string { return "" }
func (d *durationFlag) Type() string   { return "DURATION" }

func (d *durationFlag) Set(s string) error {
	if isDigits(s) {
		s += "s"
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a duration: 90 (seconds), 30s, 5m or 1h30m", s)
	}
	*d = durationFlag(v)
	return nil
}

// parseMiB parses a size on the command line into whole mebibytes: a bare
// number is MiB, "512M" too, "1G", "1.5T" and "2P" are powers of 1024 of it, and
// with "iB" behind the unit it is what formatMiB prints. Less than a MiB of a
// fraction is cut off, unless nothing would be left: 0 often means no limit. Other
// units are refused, for 1K and 1MB could mean much.
func parseMiB(text string) (uint32, error) {
	number, unit := strings.TrimSuffix(text, "iB"), uint64(1)
	fraction := false
	switch last := number[max(len(number)-1, 0):]; last {
	case "M", "m", "G", "g", "T", "t", "P", "p":
		power := strings.Index("MGTP", strings.ToUpper(last))
		number, unit, fraction = number[:len(number)-1], 1<<(10*power), power > 0
	default:
		number = text // a number cannot end in iB
	}
	if !isDecimal(number, fraction) {
		return 0, fmt.Errorf("%q is not a size: a number of MiB, or one with a unit: 512M, 1G, 1.5G, 2T (or 512MiB, 1.5GiB)", text)
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, fmt.Errorf("%q is not a size", text)
	}
	r.Mul(r, new(big.Rat).SetUint64(unit))
	mib := new(big.Int).Quo(r.Num(), r.Denom())
	if mib.Sign() == 0 && r.Sign() != 0 {
		return 0, fmt.Errorf("size %q is less than 1 MiB", text)
	}
	if !mib.IsUint64() || mib.Uint64() > math.MaxUint32 {
		return 0, fmt.Errorf("size %q is too large: at most %d MiB", text, uint32(math.MaxUint32))
	}
	return uint32(mib.Uint64()), nil
}

// maxDigits keeps the arithmetic small whatever is typed.
const maxDigits = 40

// isDecimal accepts digits and, if fraction, one point with digits around it.
func isDecimal(s string, fraction bool) bool {
	if len(s) > maxDigits {
		return false
	}
	whole, part, point := strings.Cut(s, ".")
	if point && (!fraction || !isDigits(part)) {
		return false
	}
	return isDigits(whole)
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
