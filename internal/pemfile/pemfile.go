// Package pemfile reads PEM files (RFC 7468) whole or not at all. encoding/pem passes over
// what it cannot read, so that a file that was cut off or damaged means something else than
// the one that was written: fewer authorities, or another certificate's key.
package pemfile

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// MaxSize is how long a text may be.
const MaxSize = 4 << 20

// Block is one block of a file.
type Block struct {
	Type  string // as CERTIFICATE
	Bytes []byte // DER
	Line  int    // of its BEGIN, from 1
}

// Error is what is wrong with a text, and where.
type Error struct {
	Line int // from 1
	Msg  string
}

func (e *Error) Error() string { return fmt.Sprintf("line %d: %s", e.Line, e.Msg) }

func wrong(line int, format string, args ...any) *Error {
	return &Error{line, fmt.Sprintf(format, args...)}
}

const (
	begin = "-----BEGIN "
	end   = "-----END "
	dash  = "-----"
)

// Blocks reads all blocks of a text. Other text may stand between them, as openssl writes
// it. An error is an [*Error].
func Blocks(text []byte) ([]Block, error) {
	switch {
	case len(text) > MaxSize:
		return nil, wrong(1, "the file has %d bytes, over %d", len(text), MaxSize)
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")):
		return nil, wrong(1, "the file begins with a byte order mark: save it as UTF-8 without one")
	case bytes.HasPrefix(text, []byte("\xff\xfe")), bytes.HasPrefix(text, []byte("\xfe\xff")):
		return nil, wrong(1, "the file is UTF-16: save it as ASCII or UTF-8")
	}
	var blocks []Block
	var open *Block // nil: between blocks
	var body strings.Builder
	n := 0
	for raw := range strings.Lines(string(text)) {
		n++
		line := strings.TrimRight(raw, " \t\r\n")
		switch {
		case strings.Contains(line, dash) && strings.TrimLeft(line, " \t") != line:
			return nil, wrong(n, "%.40q is indented: it begins in the first column", line)
		case open == nil && strings.HasPrefix(line, begin):
			kind, ok := marker(line, begin)
			if !ok {
				return nil, wrong(n, "%.60q is not one BEGIN line: two lines run together, or it is cut off", line)
			}
			open = &Block{Type: kind, Line: n}
			body.Reset()
		case open == nil:
			if strings.Contains(line, begin) || strings.Contains(line, end) {
				return nil, wrong(n, "%.60q stands outside of a block", line)
			}
		case line == end+open.Type+dash:
			der, err := base64.StdEncoding.Strict().DecodeString(body.String())
			if err != nil || len(der) == 0 {
				return nil, wrong(open.Line, "the %s that begins here is damaged: its content is not whole base64", open.Type)
			}
			open.Bytes = der
			blocks = append(blocks, *open)
			open = nil
		case strings.HasPrefix(line, dash):
			return nil, wrong(n, "%.60q stands in the %s that begins at line %d, which does not end before", line, open.Type, open.Line)
		case strings.Contains(line, ":"):
			return nil, wrong(n, "the %s that begins at line %d has PEM headers, as encrypted keys do: decrypt it", open.Type, open.Line)
		default:
			if at := strings.IndexFunc(line, notBase64); at >= 0 {
				r, _ := utf8.DecodeRuneInString(line[at:])
				return nil, wrong(n, "%q is no base64, column %d", r, at+1)
			}
			body.WriteString(line)
		}
	}
	if open != nil {
		return nil, wrong(open.Line, "the %s that begins here has no END: the file is cut off", open.Type)
	}
	return blocks, nil
}

func marker(line, prefix string) (kind string, ok bool) {
	kind, ok = strings.CutSuffix(strings.TrimPrefix(line, prefix), dash)
	return kind, ok && kind != "" && !strings.Contains(kind, "-")
}

func notBase64(r rune) bool {
	return !(r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '+' || r == '/' || r == '=')
}

// Certificates reads a text that holds certificates and nothing else, at least one and at
// most so many.
func Certificates(text []byte, most int) ([]*x509.Certificate, error) {
	blocks, err := Blocks(text)
	if err != nil {
		return nil, err
	}
	if len(blocks) == 0 {
		return nil, errors.New("it holds no certificate (PEM)")
	}
	if len(blocks) > most {
		return nil, wrong(blocks[most].Line, "over %d certificates", most)
	}
	list := make([]*x509.Certificate, len(blocks))
	for i, b := range blocks {
		if b.Type != "CERTIFICATE" {
			return nil, wrong(b.Line, "a %.40s stands there, where certificates belong only", b.Type)
		}
		if list[i], err = x509.ParseCertificate(b.Bytes); err != nil {
			return nil, wrong(b.Line, "the certificate that begins here cannot be read: %v", err)
		}
	}
	return list, nil
}

// KeyPair reads a certificate with those that lead to its authority behind it, and its key.
// The error says which of the two is wrong.
func KeyPair(certificate, key []byte) (*tls.Certificate, error) {
	if _, err := Certificates(certificate, 16); err != nil {
		return nil, fmt.Errorf("the certificate: %w", err)
	}
	if _, err := PrivateKey(key); err != nil {
		return nil, fmt.Errorf("the key: %w", err)
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("certificate and key: %w", err)
	}
	return &pair, nil
}

// PrivateKey finds the one private key of a text; EC PARAMETERS may stand before it. Its
// bytes are for the caller to clear.
func PrivateKey(text []byte) (*pem.Block, error) {
	blocks, err := Blocks(text)
	if err != nil {
		return nil, err
	}
	var found *pem.Block
	for _, b := range blocks {
		switch {
		case b.Type == "EC PARAMETERS":
		case !strings.HasSuffix(b.Type, "PRIVATE KEY"):
			return nil, wrong(b.Line, "a %.40s stands there, where a private key belongs", b.Type)
		case found != nil:
			return nil, wrong(b.Line, "a second private key begins here")
		default:
			found = &pem.Block{Type: b.Type, Bytes: b.Bytes}
		}
	}
	if found == nil {
		return nil, errors.New("no PEM private key stands there")
	}
	return found, nil
}
