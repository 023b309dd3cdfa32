package yamlfile

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

const day = 24 * time.Hour

// ParseDuration reads "12h", "1h30m", "500ms", "7d", "1d12h". Never negative.
func ParseDuration(s string) (time.Duration, error) {
	rest := s
	var days time.Duration
	if before, after, found := strings.Cut(s, "d"); found {
		n, err := strconv.ParseUint(before, 10, 16)
		if err != nil {
			return 0, errors.New("days are whole and come first, as in 7d12h")
		}
		days, rest = time.Duration(n)*day, after
		if rest == "" {
			return days, nil
		}
	}
	d, err := time.ParseDuration(rest)
	switch {
	case err != nil && strings.Trim(s, "0123456789") == "":
		return 0, errors.New("it has no unit; units are ms, s, m, h, d")
	case err != nil:
		return 0, errors.New("units are ms, s, m, h, d")
	case d < 0 || strings.HasPrefix(rest, "+") || strings.HasPrefix(rest, "-"):
		return 0, errors.New("it must not have a sign")
	case d > math.MaxInt64-days:
		return 0, errors.New("it is too long")
	}
	return days + d, nil
}

// FormatDuration writes d the way people write it: "12h", not "12h0m0s"; the
// decoder reads it back.
func FormatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// Rate is a number of events per second, written "500/s", "30/m" or "1000/h".
type Rate struct {
	PerSecond float64 // 0: not set
	text      string
}

// UnmarshalText reads a rate; it must be positive.
func (r *Rate) UnmarshalText(text []byte) error {
	count, unit, found := strings.Cut(string(text), "/")
	n, err := strconv.ParseUint(count, 10, 31)
	per := map[string]float64{"s": 1, "m": 60, "h": 3600}[unit]
	switch {
	case !found || err != nil || per == 0:
		return fmt.Errorf("%q is not a rate such as \"500/s\", \"30/m\" or \"1000/h\"", clip(string(text)))
	case n == 0:
		return errors.New("a rate of nothing would refuse everything; leave the object out instead")
	}
	r.PerSecond, r.text = float64(n)/per, string(text)
	return nil
}

// MarshalText writes the rate as it was read, else per second.
func (r Rate) MarshalText() ([]byte, error) {
	if r.text != "" {
		return []byte(r.text), nil
	}
	return []byte(strconv.FormatInt(int64(math.Ceil(r.PerSecond)), 10) + "/s"), nil
}

// Size is a number of bytes, written "512KiB", "100MiB" or "1GiB".
type Size struct {
	Bytes int64 // 0: not set
}

// sizeUnits are the units of a size, the largest first.
var sizeUnits = []struct {
	name  string
	bytes int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// UnmarshalText reads a size; it must be positive.
func (s *Size) UnmarshalText(text []byte) error {
	for _, unit := range sizeUnits {
		count, found := strings.CutSuffix(string(text), unit.name)
		if !found {
			continue
		}
		n, err := strconv.ParseUint(count, 10, 22)
		if err != nil || n == 0 {
			break
		}
		s.Bytes = int64(n) * unit.bytes
		return nil
	}
	return fmt.Errorf("%q is not a size such as \"512KiB\", \"100MiB\" or \"1GiB\"", clip(string(text)))
}

// MarshalText writes the size in the largest unit that gives a whole number.
func (s Size) MarshalText() ([]byte, error) {
	for _, unit := range sizeUnits {
		if s.Bytes%unit.bytes == 0 {
			return []byte(strconv.FormatInt(s.Bytes/unit.bytes, 10) + unit.name), nil
		}
	}
	return []byte(strconv.FormatInt(s.Bytes>>10, 10) + "KiB"), nil // less than 1 KiB is not read
}
