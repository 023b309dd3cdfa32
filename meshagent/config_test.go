package meshagent

import (
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

const minimal = "trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: /var/lib/entente/agent\n"

func TestFilesConfig(t *testing.T) {
	c, err := ReadConfig("agent.yaml", strings.NewReader(minimal+"files: [{service: web, combined: /etc/x.pem, mode: 0640, after: {command: [nginx, -s, reload]}}, {service: web, bundle: /etc/y.pem}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if f := c.Files[0]; f.Mode != 0o640 || f.After.Timeout != 30*time.Second {
		t.Errorf("%v %v", f.Mode, f.After.Timeout)
	}
	if f := c.Files[1]; f.Mode != 0o600 {
		t.Errorf("default mode %v", f.Mode)
	}
	text, err := yamlfile.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConfig("effective.yaml", strings.NewReader(string(text))); err != nil || !strings.Contains(string(text), "0640") {
		t.Errorf("--check prints what cannot be read: %v\n%s", err, text)
	}
	for bad, want := range map[string]string{
		"{service: web}":                                                           "nothing is to be written",
		"{service: Web, key: /x}":                                                  "label",
		"{service: web, key: x}":                                                   "absolute",
		"{service: web, key: /a/../x}":                                             "shortest form",
		"{service: web, key: /x, certificate: /x}":                                 "twice",
		"{service: web, key: /x, mode: 0644}":                                      "every user",
		"{service: web, key: /x, mode: 0o64}":                                      "octal",
		"{service: web, key: /x, mode: 0888}":                                      "octal",
		"{service: web, key: /x, after: {signal: HUP}}":                            "pidFile",
		"{service: web, key: /x, after: {pidFile: /p}}":                            "signal",
		"{service: web, key: /x, after: {signal: KILL, pidFile: /p}}":              "KILL",
		"{service: web, key: /x, after: {command: [a], signal: HUP, pidFile: /p}}": "one of them",
		"{service: web, key: /x, after: {command: [a], timeout: 1ms}}":             "100ms",
		"{service: web, jwts: [{path: /x}]}":                                       "audience",
		"{service: web, jwts: [{path: x, audience: [a]}]}":                         "absolute",
		"{service: web, key: /x, jwts: [{path: /x, audience: [a]}]}":               "twice",
		"{service: web, jwts: [{path: /x, audience: ['']}]}":                       "audience",
		"{service: web, kee: /x}":                                                  "kee",
	} {
		_, err := ReadConfig("agent.yaml", strings.NewReader(minimal+"files:\n- "+bad+"\n"))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "agent.yaml:") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestHealthAndDNSConfig(t *testing.T) {
	c, err := ReadConfig("agent.yaml", strings.NewReader(minimal+"sidecar: {inbound: \"127.0.0.1:15008\"}\nhealth: {commands: {web: [/usr/bin/true, -x]}}\ndns: {listen: \"127.80.0.1:53\"}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.DNS.Network != "127.80.0.0/16" || c.DNS.HTTPPort != 80 || c.Admin.Socket != "/var/lib/entente/agent/admin.sock" || len(c.Health.Commands["web"]) != 2 {
		t.Errorf("%+v %+v %s", c.DNS, c.Health, c.Admin.Socket)
	}
	for bad, want := range map[string]string{
		"health: {commands: {web: []}}":       "absolute path",
		"health: {commands: {web: [nagios]}}": "absolute path",
		"dns: {listen: \"127.80.0.1:53\"}":    "sidecar.inbound",
		"dns: {listen: \"0.0.0.0:53\"}":       "loopback",
		"dns: {network: 10.0.0.0/16}":         "/16 of loopback",
		"dns: {network: 127.80.0.0/8}":        "/16 of loopback",
		"dns: {httpPort: 65536}":              "65535",

		"sds: {defaultSVIDName: ''}":                            "no name of a secret",
		"sds: {defaultSVIDName: '*'}":                           "no name of a secret",
		"sds: {defaultBundleName: spiffe://banking.example}":    "no name of a secret",
		"sds: {defaultAllBundlesName: ROOTCA}":                  "defaultBundleName already",
		"sds: {default_svid_name: x}":                           "defaultSVIDName",
		"cache: {passphraseFile: /p, systemdCredential: cache}": "give one of them",
	} {
		if _, err := ReadConfig("agent.yaml", strings.NewReader(minimal+bad+"\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
